"""Bundles -> data-parallel ranks and their micro-batches: about equal compute, bounded tokens. Arithmetic on two numbers a bundle.

Compute and tokens are balanced apart because attention is quadratic: a row of one sequence of 32K tokens costs a mixture-of-experts model three
times as much as a row of 32 sequences of 1K, and takes the same memory.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

Plan = list[list[tuple[int, ...]]]
"""[data_parallel_size][n_micro] numbers of the bundles in each micro-batch."""


@dataclass(slots=True)
class _Row:
    """A micro-batch while it is being filled."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0
    cost: int = 0

    def takes(self, tokens: int, limit: int) -> bool:
        return not self.members or self.tokens + tokens <= limit


def plan_micro_batches(tokens: Sequence[int], costs: Sequence[int], data_parallel_size: int, limit: int) -> Plan:
    """Assign bundles of `tokens` tokens and `costs` (FLOPs, say; above 0) to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches, the fewest found (experts and pipelines of different ranks meet in collectives), and none is
    empty. A micro-batch holds at most `limit` tokens unless a single bundle is longer; where the number of bundles does not divide by the ranks
    there may be too few of them to keep to that. Ranks cost about the same, and so do their micro-batches of one number, which go from the
    costliest to the cheapest: with experts on several ranks they wait for each other in every layer. Deterministic.
    Raises ValueError when there are fewer bundles than ranks.
    """
    if len(costs) < data_parallel_size:
        raise ValueError(f"{len(costs)} bundles of sequences cannot be spread over {data_parallel_size} data-parallel ranks; "
                         "each needs at least one")
    most = len(costs) // data_parallel_size
    fewest = -(-sum(min(n, limit) for n in tokens) // (limit * data_parallel_size))  # a longer bundle takes one micro-batch too
    per_rank = max(1, min(most, fewest))
    while (ranks := _fill(tokens, costs, data_parallel_size, per_rank, limit, overfill=per_rank == most)) is None:
        per_rank += 1
    return [[tuple(sorted(row.members)) for row in sorted(rank, key=lambda row: (-row.cost, row.members))] for rank in ranks]


def _fill(tokens: Sequence[int], costs: Sequence[int], ranks: int, per_rank: int, limit: int, overfill: bool) -> list[list[_Row]] | None:
    """The costliest bundle first, each to the rank with the least so far that has room for it. None where one finds no room, unless `overfill`."""
    plan = [[_Row() for _ in range(per_rank)] for _ in range(ranks)]
    profile = [0] * per_rank  # of the rows of each number, the costliest
    lightest = [(0, rank) for rank in range(ranks)]  # a heap
    empty = ranks * per_rank
    for done, index in enumerate(sorted(range(len(costs)), key=lambda i: (-costs[i], i))):
        only_empty = len(costs) - done == empty  # as many bundles left as rows without one
        full = []
        number = None
        while lightest and number is None:
            load, rank = heapq.heappop(lightest)
            number = _choose(plan[rank], tokens[index], costs[index], profile, limit, only_empty)
            if number is None:
                full.append((load, rank))
        if number is None:
            if not overfill:
                return None
            load, rank = full.pop(0)
            number = min(range(per_rank), key=lambda n: (plan[rank][n].tokens, n))
        row = plan[rank][number]
        empty -= not row.members
        row.members.append(index)
        row.tokens += tokens[index]
        row.cost += costs[index]
        profile[number] = max(profile[number], row.cost)
        for entry in (*full, (load + costs[index], rank)):
            heapq.heappush(lightest, entry)
    return plan


def _choose(rows: Sequence[_Row], tokens: int, cost: int, profile: Sequence[int], limit: int, only_empty: bool) -> int | None:
    """The row that the bundle makes exceed the costliest one of its number, on any rank, the least; of several the one nearest to it."""
    best = number = None
    for n, (row, costliest) in enumerate(zip(rows, profile, strict=True)):
        if row.members if only_empty else not row.takes(tokens, limit):
            continue
        key = (max(0, row.cost + cost - costliest), costliest - row.cost)
        if best is None or key < best:
            best, number = key, n
    return number
