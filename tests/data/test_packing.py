"""Packing against a naive loop, and the properties of the plan over random batches."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_antisd.data.packing import input_length, pack, plan_micro_batches
from megatron_antisd.records import ScoringView


def random_views(generator: random.Random, count: int, longest: int = 12) -> tuple[ScoringView, ...]:
    def ids() -> tuple[int, ...]:
        return tuple(generator.randrange(50) for _ in range(generator.randint(1, longest)))

    return tuple(ScoringView(prompt_ids=ids(), response_ids=ids()) for _ in range(count))


def naive_pairs(view: ScoringView) -> list[tuple[tuple[int, ...], int]]:
    """(everything the model has read, the token it must predict) for each response token, written down without any arithmetic."""
    seen, pairs = list(view.prompt_ids), []
    for token in view.response_ids:
        pairs.append((tuple(seen), token))
        seen.append(token)
    return pairs


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_every_response_token_is_predicted_from_exactly_what_precedes_it(multiple: int) -> None:
    generator = random.Random(multiple)
    for _ in range(50):
        views = random_views(generator, generator.randint(1, 6))
        indices = tuple(generator.sample(range(len(views)), generator.randint(1, len(views))))
        row = pack(views, indices, multiple=multiple, pad_id=49)
        starts = [0]
        for length in row.lengths:
            starts.append(starts[-1] + length)
        found = []
        for position, target in zip(row.predicting.tolist(), row.targets.tolist(), strict=True):
            start = max(s for s in starts[:-1] if s <= position)  # a token sees its own sequence only, up to and with itself
            found.append((tuple(row.input_ids[start : position + 1].tolist()), target))
        assert found == [pair for index in indices for pair in naive_pairs(views[index])]


@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
def test_padding_is_the_least_and_a_sequence_of_its_own(multiple: int) -> None:
    generator = random.Random(7)
    for _ in range(50):
        views = random_views(generator, 4)
        row = pack(views, (2, 0, 3), multiple=multiple, pad_id=49)
        real = sum(input_length(views[i]) for i in row.indices)
        assert row.indices == (2, 0, 3)
        assert len(row.input_ids) == sum(row.lengths) == real + row.padding
        assert len(row.input_ids) % multiple == 0 and 0 <= row.padding < multiple
        assert row.lengths[:3] == tuple(input_length(views[i]) for i in row.indices)
        assert row.lengths[3:] == ((row.padding,) if row.padding else ())
        assert row.input_ids[real:].tolist() == [49] * row.padding
        assert row.predicting.max() < real
        assert row.input_ids.dtype == row.predicting.dtype == row.targets.dtype == torch.int64


def test_last_response_token_is_never_an_input() -> None:
    row = pack((ScoringView(prompt_ids=(5, 6), response_ids=(7,)),), (0,), multiple=1)
    assert (row.input_ids.tolist(), row.predicting.tolist(), row.targets.tolist(), row.lengths) == ([5, 6], [1], [7], (2,))


@pytest.mark.parametrize(("prompt", "response"), [((), (1,)), ((1,), ())])
def test_views_without_prompt_or_response_are_refused(prompt: tuple[int, ...], response: tuple[int, ...]) -> None:
    good = ScoringView(prompt_ids=(1,), response_ids=(2,))
    with pytest.raises(ValueError, match=rf"view 1 has {len(prompt)} prompt and {len(response)} response tokens"):
        pack((good, ScoringView(prompt_ids=prompt, response_ids=response)), (0, 1), multiple=1)


def plans() -> list[tuple[list[int], int, int]]:
    """(costs, data-parallel size, limit), with very long sequences, many short ones, and counts that do not divide."""
    generator = random.Random(0)
    cases = []
    for _ in range(400):
        replicas = generator.choice((1, 1, 2, 3, 4, 8))
        count = generator.randint(replicas, 60)
        longest = generator.choice((1, 10, 100, 1000))
        cases.append(([generator.randint(1, longest) for _ in range(count)], replicas, generator.choice((1, 50, 300, 1500, 100_000))))
    return cases


def test_every_view_is_planned_exactly_once_and_ranks_run_equally_many_rows() -> None:
    for costs, replicas, limit in plans():
        plan = plan_micro_batches(costs, replicas, limit)
        assert sorted(index for rank in plan for row in rank for index in row) == list(range(len(costs)))
        assert len(plan) == replicas and len({len(rank) for rank in plan}) == 1
        assert all(row and list(row) == sorted(row) for rank in plan for row in rank)
        assert plan == plan_micro_batches(tuple(costs), replicas, limit), "the plan must not depend on anything else"


def test_limit_holds_but_for_a_single_longer_sequence() -> None:
    """Promised where the count divides by the ranks (config_rules asks for it): otherwise there may be too few sequences for the rows."""
    for costs, replicas, limit in plans():
        costs = costs[: len(costs) // replicas * replicas]
        for rank in plan_micro_batches(costs, replicas, limit):
            for row in rank:
                assert len(row) == 1 or sum(costs[i] for i in row) <= limit, (costs, replicas, limit, row)


def test_limit_holds_where_one_rank_has_a_single_long_sequence() -> None:
    plan = plan_micro_batches([450, 100, 100, 100, 100, 100], 2, 450)
    costs = [450, 100, 100, 100, 100, 100]
    assert max(sum(costs[i] for i in row) for rank in plan for row in rank) <= 450


def test_ranks_are_balanced() -> None:
    """Longest first: no rank carries more than the lightest one and the longest sequence together."""
    for costs, replicas, _ in plans():
        loads = [sum(costs[i] for row in rank for i in row) for rank in plan_micro_batches(costs, replicas, 1 << 30)]
        assert max(loads) - min(loads) <= max(costs)


def test_everything_that_fits_is_one_row() -> None:
    assert plan_micro_batches([5, 3, 2], 1, 10) == [[(0, 1, 2)]]
    assert len(plan_micro_batches([5, 3, 2], 1, 9)[0]) == 2
    assert plan_micro_batches([5, 5], 2, 1) == [[(0,)], [(1,)]]


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sequences cannot be spread over 3 data-parallel ranks"):
        plan_micro_batches([4, 4], 3, 100)
