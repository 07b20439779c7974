"""Views -> packed micro-batches. The only place that shifts by one token.

A view of prompt p and response r enters the model as `p + r[:-1]`; the hidden state at input position `len(p) - 1 + t`
predicts response token `t`. The last response token is never an input. No padding between sequences: a micro-batch is one row
of concatenated sequences, filled at its end to the multiple that its tensor- and context-parallel ranks divide.

Views whose prompts begin alike (a group's rollouts; a teacher's prompts, which hold one of two solutions and end in the feedback) share
that beginning: the row holds it once, as a sequence of its own, the trunk, and the rest of each view as a sequence that continues it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_antisd.records import ScoringView


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One packed row."""

    indices: tuple[int, ...]
    """Which views of the batch it holds, in order."""
    input_ids: torch.Tensor
    """[T] int64, sequences end to end, then padding."""
    lengths: tuple[int, ...]
    """Length of each sequence; the padding, where there is any, is a last sequence of its own. Sums to T."""
    continues: tuple[int | None, ...]
    """For each sequence the number of the earlier one, a trunk, that it goes on from, or None."""
    predicting: torch.Tensor
    """[R] int64, positions in the row whose hidden state predicts a response token."""
    targets: torch.Tensor
    """[R] int64, those response tokens."""
    padding: int
    """Padding tokens at the end of the row."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Views that are packed together."""

    indices: tuple[int, ...]
    """Which views of the batch."""
    trunk: int
    """How many first tokens of their prompts they share, less than the shortest prompt has; 0 for a view alone."""

    def cost(self, views: Sequence[ScoringView]) -> int:
        """Tokens that pass through the model."""
        return self.trunk + sum(input_length(views[i]) - self.trunk for i in self.indices)


def input_length(view: ScoringView) -> int:
    """Tokens of a view that pass through the model when it shares nothing."""
    return len(view.prompt_ids) + len(view.response_ids) - 1


def bundle_views(views: Sequence[ScoringView], data_parallel_size: int, limit: int) -> list[Bundle]:
    """Divide views into bundles so that the fewest tokens pass through the model.

    A bundle shares at least half of its shortest prompt, and costs at most `limit` tokens and half a data-parallel rank's fair share (larger ones
    could not be balanced) unless it is a single view. There are at least as many bundles as ranks where there are as many views.
    Deterministic.
    """
    bound = min(limit, -(-sum(map(input_length, views)) // (2 * data_parallel_size)))
    # Prompts that begin alike stand side by side in this order, so a bundle is a run of it.
    order = sorted(range(len(views)), key=lambda i: (views[i].prompt_ids, i))
    bundles = [Bundle(indices=tuple(sorted(order[start:end])), trunk=trunk) for start, end, trunk in _best_runs([views[i] for i in order], bound)]
    while len(bundles) < min(data_parallel_size, len(views)):
        bundles = _divide_largest(bundles)
    return sorted(bundles, key=lambda bundle: bundle.indices)


def plan_bundles(views: Sequence[ScoringView], data_parallel_size: int, limit: int) -> tuple[list[Bundle], list[list[tuple[int, ...]]]]:
    """Bundles, and which of them each data-parallel rank's micro-batches hold ([data_parallel_size][n_micro] tuples of bundle numbers).

    Ranks run equally many micro-batches, so a number of bundles that does not divide by the ranks can leave some stacked beyond `limit`; then
    bundles are divided until they fit, at the price of a trunk computed twice. Only a single longer view exceeds `limit`, where the number
    of views divides by the ranks. Deterministic.
    """
    bundles = bundle_views(views, data_parallel_size, limit)
    while True:
        costs = [bundle.cost(views) for bundle in bundles]
        plan = plan_micro_batches(costs, data_parallel_size, limit)
        fits = all(len(row) == 1 or sum(costs[b] for b in row) <= limit for rank in plan for row in rank)
        if fits or len(bundles) == len(views):
            return bundles, plan
        bundles = sorted(_divide_largest(bundles), key=lambda bundle: bundle.indices)


def _divide_largest(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The bundle of most views in two halves; there must be one of several."""
    largest = max(range(len(bundles)), key=lambda b: len(bundles[b].indices))
    whole = bundles[largest]
    middle = len(whole.indices) // 2
    halves = [Bundle(indices=part, trunk=whole.trunk if len(part) > 1 else 0) for part in (whole.indices[:middle], whole.indices[middle:])]
    return [*bundles[:largest], *halves, *bundles[largest + 1 :]]


def _best_runs(views: Sequence[ScoringView], bound: int) -> list[tuple[int, int, int]]:
    """(start, end, trunk) of the runs that `views`, sorted by prompt, are best divided into: dynamic programming over the end of the last one."""
    common = [0, *(_common_prefix(a.prompt_ids, b.prompt_ids) for a, b in itertools.pairwise(views))]
    saved, last = [0], [(0, 0)]  # for the first n views: the most tokens saved, and (start, trunk) of the run that ends there
    for end in range(1, len(views) + 1):
        saved.append(saved[-1])
        last.append((end - 1, 0))
        trunk = len(views[end - 1].prompt_ids) - 1
        shortest, tokens = trunk + 1, input_length(views[end - 1])
        for start in range(end - 2, -1, -1):
            shortest, tokens = min(shortest, len(views[start].prompt_ids)), tokens + input_length(views[start])
            trunk = min(trunk, common[start + 1], shortest - 1)
            gain = (end - start - 1) * trunk
            if 2 * trunk < shortest or tokens - gain > bound:
                break
            if saved[start] + gain > saved[end]:
                saved[end], last[end] = saved[start] + gain, (start, trunk)
    runs, end = [], len(views)
    while end:
        start, trunk = last[end]
        runs.append((start, end, trunk))
        end = start
    return runs[::-1]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for length, (x, y) in enumerate(zip(a, b, strict=False)):  # the shorter one may end first
        if x != y:
            return length
    return min(len(a), len(b))


def plan_micro_batches(costs: Sequence[int], data_parallel_size: int, limit: int) -> list[list[tuple[int, ...]]]:
    """Assign bundles of `costs` tokens to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches (experts and pipelines of different ranks meet in collectives) and no
    micro-batch is empty. A micro-batch holds at most `limit` tokens unless a single bundle is longer; where the number of
    bundles does not divide by the ranks there may be too few of them to keep to that.
    Deterministic; longest first into the lightest bin. Returns [data_parallel_size][n_micro] tuples of indices.
    Raises ValueError when there are fewer bundles than ranks.
    """
    if len(costs) < data_parallel_size:
        raise ValueError(f"{len(costs)} bundles of sequences cannot be spread over {data_parallel_size} data-parallel ranks; "
                         "each needs at least one")
    # All ranks' micro-batches at once: a rank with few long sequences must not keep another one from dividing its many short ones.
    most = len(costs) // data_parallel_size
    per_rank = min(most, max(1, -(-sum(costs) // (limit * data_parallel_size))))
    bins = _balance(costs, per_rank * data_parallel_size)
    while per_rank < most and not all(len(group) == 1 or sum(costs[i] for i in group) <= limit for group in bins):
        per_rank += 1
        bins = _balance(costs, per_rank * data_parallel_size)
    loads = [sum(costs[i] for i in group) for group in bins]
    return [[tuple(sorted(bins[b])) for b in sorted(rank)] for rank in _balance(loads, data_parallel_size, most=per_rank)]


def pack(views: Sequence[ScoringView], bundles: Sequence[Bundle], multiple: int, pad_id: int = 0) -> MicroBatch:
    """Lay bundles end to end in one row whose length is a multiple of `multiple`."""
    tokens: list[int] = []
    lengths: list[int] = []
    continues: list[int | None] = []
    predicting: list[torch.Tensor] = []

    def add(ids: Sequence[int], parent: int | None = None) -> None:
        tokens.extend(ids)
        lengths.append(len(ids))
        continues.append(parent)

    for bundle in bundles:
        parent = None
        if bundle.trunk:
            parent = len(lengths)
            add(views[bundle.indices[0]].prompt_ids[: bundle.trunk])
        for index in bundle.indices:
            view = views[index]
            _check_view(view, index)
            add((*view.prompt_ids[bundle.trunk :], *view.response_ids[:-1]), parent)
            predicting.append(torch.arange(len(tokens) - len(view.response_ids), len(tokens)))
    padding = -len(tokens) % multiple
    if padding:
        add([pad_id] * padding)
    indices = tuple(index for bundle in bundles for index in bundle.indices)
    return MicroBatch(
        indices=indices,
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        lengths=tuple(lengths),
        continues=tuple(continues),
        predicting=torch.cat(predicting),
        targets=torch.tensor([token for index in indices for token in views[index].response_ids], dtype=torch.int64),
        padding=padding,
    )


def _check_view(view: ScoringView, index: int) -> None:
    if not view.prompt_ids or not view.response_ids:
        raise ValueError(f"view {index} has {len(view.prompt_ids)} prompt and {len(view.response_ids)} response tokens; "
                         "scoring needs at least one of each")


def _balance(costs: Sequence[int], bins: int, most: int | None = None) -> list[list[int]]:
    """Indices of `costs`, the largest first, each into the lightest bin with fewer than `most` members. With at least as many
    indices as bins, no bin stays empty."""
    members: list[list[int]] = [[] for _ in range(bins)]
    lightest = [(0, 0, b) for b in range(bins)]  # a heap of (load, members, bin): an empty bin comes before one of costs 0
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, b = heapq.heappop(lightest)
        members[b].append(index)
        if count + 1 != most:
            heapq.heappush(lightest, (load + costs[index], count + 1, b))
    return members
