"""Packing and balance over drawn batches, from the views to the tokens that each context-parallel rank holds."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_antisd.data.balance import plan_micro_batches
from megatron_antisd.data.packing import CostModel, MicroBatch, bundle_views, input_length, pack, plan_bundles
from megatron_antisd.records import ScoringView

COSTS = st.sampled_from([CostModel(token=1, scored=0, pairs=()), CostModel(token=20, scored=3, pairs=((None, 2), (4, 5)))])


@st.composite
def batches(draw: st.DrawFn, most: int = 12) -> tuple[ScoringView, ...]:
    """Prompts of few different tokens that often begin alike, be one another's beginning or equal, and responses of any length."""
    trunks = draw(st.lists(st.lists(st.integers(0, 2), max_size=10), min_size=1, max_size=3))
    views = []
    for _ in range(draw(st.integers(1, most))):
        prompt = (*draw(st.sampled_from(trunks)), *draw(st.lists(st.integers(0, 2), max_size=3)))
        views.append(ScoringView(prompt_ids=prompt or (0,), response_ids=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=8)))))
    return tuple(views)


def predictions(view: ScoringView) -> list[tuple[tuple[int, ...], int]]:
    """(everything that was read, the token to predict) of every response token."""
    return [((*view.prompt_ids, *view.response_ids[:t]), token) for t, token in enumerate(view.response_ids)]


def read_off(row: MicroBatch) -> list[tuple[tuple[int, ...], int]]:
    """The same, from a packed row: the tokens of the predicting position's own sequence up to it, behind those of its trunk."""
    starts = [sum(row.lengths[:n]) for n in range(len(row.lengths))]
    ids, found = row.input_ids.tolist(), []
    for position, target in zip(row.predicting.tolist(), row.targets.tolist(), strict=True):
        number = max(n for n, start in enumerate(starts) if start <= position)
        parent = row.continues[number]
        trunk = [] if parent is None else ids[starts[parent] : starts[parent] + row.lengths[parent]]
        found.append(((*trunk, *ids[starts[number] : position + 1]), target))
    return found


@given(views=batches(), ranks=st.integers(1, 4), limit=st.integers(1, 120), multiple=st.sampled_from([1, 2, 3, 4, 8]), model=COSTS)
def test_every_response_token_is_predicted_once_from_its_own_past(
    views: tuple[ScoringView, ...], ranks: int, limit: int, multiple: int, model: CostModel
) -> None:
    ranks = min(ranks, len(views))
    bundles, plan = plan_bundles(views, ranks, limit, model)
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1, "all ranks run equally many rows"
    seen: list[int] = []
    for numbers in (numbers for rank in plan for numbers in rank):
        row = pack(views, [bundles[b] for b in numbers], multiple=multiple)
        assert read_off(row) == [pair for index in row.indices for pair in predictions(views[index])]
        assert sum(row.lengths) == len(row.input_ids) and len(row.input_ids) % multiple == 0 and 0 <= row.padding < multiple
        real = len(row.input_ids) - row.padding
        assert real == sum(bundles[b].tokens(views) for b in numbers)
        if len(views) % ranks == 0:
            assert real <= limit or len(row.indices) == 1, "only a lone view may exceed the bound"
        seen += row.indices
    assert sorted(seen) == list(range(len(views)))


@given(views=batches(), ranks=st.integers(1, 4), limit=st.integers(1, 120), model=COSTS)
def test_bundles_share_only_what_is_common_and_never_cost_more(
    views: tuple[ScoringView, ...], ranks: int, limit: int, model: CostModel
) -> None:
    bundles = bundle_views(views, ranks, limit, model)
    for bundle in bundles:
        prompts = [views[i].prompt_ids for i in bundle.indices]
        assert len({prompt[: bundle.trunk] for prompt in prompts}) == 1 and all(len(prompt) > bundle.trunk for prompt in prompts)
        assert len(bundle.indices) > 1 or bundle.trunk == 0
        assert bundle.tokens(views) <= sum(input_length(views[i]) for i in bundle.indices)
        assert bundle.cost(views, model) <= sum(model.view(views[i]) for i in bundle.indices)
        assert len(bundle.indices) == 1 or bundle.tokens(views) <= limit
    assert sorted(i for bundle in bundles for i in bundle.indices) == list(range(len(views)))
    assert bundle_views(views, ranks, limit, model) == bundles


@settings(max_examples=60)
@given(views=batches(), context=st.sampled_from([1, 2, 3, 4]), tensor=st.sampled_from([1, 2, 4]))
def test_context_parallel_ranks_share_out_a_row(views: tuple[ScoringView, ...], context: int, tensor: int) -> None:
    """With the multiple of a layout: equal parts, whole for its tensor-parallel ranks, every token and every prediction on one rank."""
    from megatron_antisd.models.attention import context_part

    multiple = tensor if context == 1 else context * math.lcm(2, tensor)  # ProcessLayout.row_multiple
    row = pack(views, bundle_views(views, 1, 1 << 20, CostModel(token=1, scored=0, pairs=())), multiple=multiple)
    parts = [context_part(len(row.input_ids), rank, context) for rank in range(context)]
    assert {len(part) for part in parts} == {len(row.input_ids) // context} and len(parts[0]) % tensor == 0
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(row.input_ids)))
    held = [int(torch.isin(row.predicting, part).sum()) for part in parts]
    assert sum(held) == len(row.targets) == sum(len(view.response_ids) for view in views)


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    ranks = draw(st.integers(1, 5))
    count = draw(st.integers(ranks, 24))
    numbers = st.lists(st.integers(1, 50) | st.sampled_from([1000]), min_size=count, max_size=count)
    return draw(numbers), draw(numbers), ranks


@given(case=loads(), limit=st.integers(1, 400))
def test_plans_are_whole_bounded_even_and_the_same_again(case: tuple[list[int], list[int], int], limit: int) -> None:
    tokens, costs, ranks = case
    plan = plan_micro_batches(tokens, costs, ranks, limit)
    assert sorted(i for rank in plan for row in rank for i in row) == list(range(len(tokens)))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1 and all(row for rank in plan for row in rank)
    if len(tokens) % ranks == 0:
        assert all(len(row) == 1 or sum(tokens[i] for i in row) <= limit for rank in plan for row in rank)
    for rank in plan:
        ordered = [sum(costs[i] for i in row) for row in rank]
        assert ordered == sorted(ordered, reverse=True)
    assert plan_micro_batches(tokens, costs, ranks, limit) == plan
