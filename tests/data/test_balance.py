"""Micro-batches over ranks: the properties of the plan over random batches, and the cost model against counting."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megatron_antisd.data.balance import Plan, plan_micro_batches
from megatron_antisd.data.packing import Bundle, CostModel
from megatron_antisd.records import ScoringView

Case = tuple[list[int], list[int], int, int]
"""Tokens and costs of the bundles, data-parallel size, limit."""


def plans() -> list[Case]:
    """Very long sequences, many short ones, counts that do not divide; costs that grow with the tokens, with their square, or as they like."""
    generator = random.Random(0)
    cases = []
    for _ in range(600):
        replicas = generator.choice((1, 1, 2, 3, 4, 8))
        count = generator.randint(replicas, 60)
        longest = generator.choice((1, 10, 100, 1000))
        tokens = [generator.randint(1, longest) for _ in range(count)]
        costs = generator.choice((tokens, [100 * n + n * n for n in tokens], [generator.randint(1, 50) for _ in tokens]))
        cases.append((tokens, costs, replicas, generator.choice((1, 50, 300, 1500, 100_000))))
    return cases


def heavy_tailed(generator: random.Random, count: int) -> tuple[list[int], list[int]]:
    """Tokens up to 1,000 and their costs, which for the longest are half attention."""
    tokens = [min(1000, int(100 * generator.lognormvariate(0, 1)) + 1) for _ in range(count)]
    return tokens, [1000 * n + n * n for n in tokens]


def loads(plan: Plan, costs: list[int]) -> list[int]:
    return [sum(costs[i] for row in rank for i in row) for rank in plan]


def waiting(plan: Plan, costs: list[int]) -> int:
    """The costliest micro-batch of each number, added up."""
    return sum(max(sum(costs[i] for i in row) for row in rows) for rows in zip(*plan, strict=True))


def test_every_view_is_planned_exactly_once_and_ranks_run_equally_many_rows() -> None:
    for tokens, costs, replicas, limit in plans():
        plan = plan_micro_batches(tokens, costs, replicas, limit)
        assert sorted(index for rank in plan for row in rank for index in row) == list(range(len(costs)))
        assert len(plan) == replicas and len({len(rank) for rank in plan}) == 1
        assert all(row and list(row) == sorted(row) for rank in plan for row in rank)
        assert plan == plan_micro_batches(tuple(tokens), tuple(costs), replicas, limit), "the plan must not depend on anything else"


def test_limit_holds_but_for_a_single_longer_sequence() -> None:
    """Promised where the count divides by the ranks (config_rules asks for it): otherwise there may be too few sequences for the rows."""
    for tokens, costs, replicas, limit in plans():
        count = len(tokens) // replicas * replicas
        for rank in plan_micro_batches(tokens[:count], costs[:count], replicas, limit):
            for row in rank:
                assert len(row) == 1 or sum(tokens[i] for i in row) <= limit, (tokens, costs, replicas, limit, row)


def test_limit_holds_where_one_rank_has_a_single_long_sequence() -> None:
    tokens = [450, 100, 100, 100, 100, 100]
    plan = plan_micro_batches(tokens, tokens, 2, 450)
    assert max(sum(tokens[i] for i in row) for rank in plan for row in rank) <= 450


def test_ranks_are_balanced() -> None:
    """Costliest first: no rank carries more than the lightest one and the costliest bundle together."""
    for tokens, costs, replicas, _ in plans():
        found = loads(plan_micro_batches(tokens, costs, replicas, 1 << 30), costs)
        assert max(found) - min(found) <= max(costs)


def test_a_ranks_micro_batches_go_from_the_costliest_to_the_cheapest() -> None:
    for tokens, costs, replicas, limit in plans():
        for rank in plan_micro_batches(tokens, costs, replicas, limit):
            assert all(sum(costs[i] for i in a) >= sum(costs[i] for i in b) for a, b in pairwise(rank))


@pytest.mark.parametrize("replicas", [4, 16, 64])
def test_heavy_tails_are_balanced_by_cost(replicas: int) -> None:
    """32 sequences a rank, as many tokens a row as the longest has: the slowest rank is within 2 % of the least possible, and no worse than when
    balanced by tokens; where ranks wait in every micro-batch, they wait for less."""
    for seed in range(10):
        tokens, costs = heavy_tailed(random.Random(seed), 32 * replicas)
        ours, by_tokens = (plan_micro_batches(tokens, by, replicas, 1000) for by in (costs, tokens))
        assert len(ours[0]) <= len(by_tokens[0]) + 1
        least = max(sum(costs) / replicas, max(costs))
        assert least <= max(loads(ours, costs)) <= 1.02 * least
        assert max(loads(ours, costs)) <= max(loads(by_tokens, costs))
        assert waiting(ours, costs) < waiting(by_tokens, costs)
        assert waiting(ours, costs) <= 1.2 * least


def test_one_sequence_may_bound_the_slowest_rank() -> None:
    """Few sequences a rank: the longest one's rank gets nothing beside it but what makes its micro-batches as many as the others'."""
    costs = [100, *[10] * 15]
    assert max(loads(plan_micro_batches(costs, costs, 4, 1000), costs)) == 100
    assert max(loads(plan_micro_batches(costs, costs, 4, 30), costs)) == 110


def test_everything_that_fits_is_one_row() -> None:
    assert plan_micro_batches([5, 3, 2], [5, 3, 2], 1, 10) == [[(0, 1, 2)]]
    assert len(plan_micro_batches([5, 3, 2], [5, 3, 2], 1, 9)[0]) == 2
    assert plan_micro_batches([5, 5], [5, 5], 2, 1) == [[(0,)], [(1,)]]


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="2 bundles of sequences cannot be spread over 3 data-parallel ranks"):
        plan_micro_batches([4, 4], [4, 4], 3, 100)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_costs_are_those_of_counting_every_pair(window: int | None) -> None:
    """A trunk once, and for each view the tokens behind it, each with the keys that it sees."""
    model = CostModel(token=1000, scored=70, pairs=((window, 3),))

    def counted(positions: range) -> int:
        return sum(1000 + 3 * sum(1 for key in range(position + 1) if window is None or key > position - window) for position in positions)

    generator = random.Random(1)
    for _ in range(20):
        trunk = generator.randint(0, 9)
        sizes = [(trunk + generator.randint(1, 6), generator.randint(1, 9)) for _ in range(generator.randint(1, 5) if trunk else 1)]
        views = [ScoringView(prompt_ids=(1,) * prompt, response_ids=(2,) * response) for prompt, response in sizes]
        expected = counted(range(trunk)) + sum(counted(range(trunk, p + r - 1)) + 70 * r for p, r in sizes)
        assert Bundle(indices=tuple(range(len(views))), trunk=trunk).cost(views, model) == expected


HIDDEN, HEADS, GROUPS, HEAD, WORDS, LAYERS = 48, 4, 2, 8, 100, 4
COMMON = dict(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD, vocab_size=WORDS, num_hidden_layers=LAYERS,
              intermediate_size=80)
ATTENTION = HIDDEN * HEAD * (HEADS + 2 * GROUPS) + HEADS * HEAD * HIDDEN
PAIR = 2 * 2 * HEADS * HEAD  # a product with the key, one with the value


@pytest.mark.parametrize(("config", "weights", "pairs"), [
    (dict(model_type="qwen3"), ATTENTION + 3 * HIDDEN * 80, ((None, LAYERS * PAIR),)),
    (dict(model_type="qwen3_moe", num_experts=16, num_experts_per_tok=3, moe_intermediate_size=24),
     ATTENTION + HIDDEN * 16 + 3 * 3 * HIDDEN * 24, ((None, LAYERS * PAIR),)),
    (dict(model_type="olmo3", sliding_window=32), ATTENTION + 3 * HIDDEN * 80, ((32, 3 * PAIR), (None, PAIR))),
], ids=["dense", "experts", "windows"])
def test_cost_model_of_a_checkpoint(config: dict[str, Any], weights: int, pairs: tuple[tuple[int | None, int], ...], tmp_path: Path) -> None:
    from megatron_antisd.compat import megatron_cpu

    megatron_cpu.install()
    from megatron_antisd.models.description import describe
    from megatron_antisd.parallel.rows import cost_model

    (tmp_path / "config.json").write_text(json.dumps(COMMON | config))
    assert cost_model(describe(tmp_path, 1)) == CostModel(token=2 * LAYERS * weights, scored=2 * HIDDEN * WORDS, pairs=pairs)
