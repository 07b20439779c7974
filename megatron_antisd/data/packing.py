"""Views -> packed micro-batches. The only place that shifts by one token.

A view of prompt p and response r enters the model as `p + r[:-1]`; the hidden state at input position `len(p) - 1 + t`
predicts response token `t`. The last response token is never an input. No padding between sequences: a micro-batch is one row
of concatenated sequences, filled at its end to the multiple that its tensor- and context-parallel ranks divide.

Views whose prompts begin alike (a group's rollouts; a teacher's prompts, which hold one of two solutions and end in the feedback) share
that beginning: the row holds it once, as a sequence of its own, the trunk, and the rest of each view as a sequence that continues it. A trunk's
experts, where they are given, are those of the first view that has any.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_antisd.data.balance import Plan, plan_micro_batches
from megatron_antisd.records import ScoringView
from megatron_antisd.token_routes import FREE

PARTS = (1, 2, 4, 8, 16, 32)
"""Of a rank's fair share of compute: how large a bundle of several views may be, tried one after the other."""
SLACK = 0.01
"""How far the slowest rank may be from the least possible before smaller bundles are tried."""


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
    routes: torch.Tensor | None = None
    """[T, layers, top_k] int16 experts that are given, -1 where a token routes by itself; None where all do."""
    padding: int
    """Padding tokens at the end of the row."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """FLOPs of a forward pass over the whole model. A backward pass takes twice as many, whatever they go into, so both are balanced alike."""

    token: int
    """Of a token, attention's pairs and the output layer aside."""
    scored: int
    """Of a response token in the output layer."""
    pairs: tuple[tuple[int | None, int], ...]
    """(window, FLOPs of a query-key pair in all layers with that window): how many last tokens one sees there, itself included; None: all."""

    def beginning(self, tokens: int) -> int:
        """Of the first `tokens` of a sequence. A tail costs what its whole sequence does less its trunk: a query sees the same keys either way."""
        return tokens * self.token + sum(flops * _pairs(tokens, window) for window, flops in self.pairs)

    def view(self, view: ScoringView) -> int:
        """Of a view that shares nothing."""
        return self.beginning(input_length(view)) + self.scored * len(view.response_ids)


def _pairs(tokens: int, window: int | None) -> int:
    """Query-key pairs of a causal sequence."""
    seen = tokens if window is None else min(tokens, window)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Views that are packed together."""

    indices: tuple[int, ...]
    """Which views of the batch."""
    trunk: int
    """How many first tokens of their prompts they share, less than the shortest prompt has; 0 for a view alone."""

    def tokens(self, views: Sequence[ScoringView]) -> int:
        """How many pass through the model."""
        return sum(input_length(views[i]) for i in self.indices) - (len(self.indices) - 1) * self.trunk

    def cost(self, views: Sequence[ScoringView], model: CostModel) -> int:
        """FLOPs of the trunk once and of what continues it."""
        return sum(model.view(views[i]) for i in self.indices) - (len(self.indices) - 1) * model.beginning(self.trunk)


def input_length(view: ScoringView) -> int:
    """Tokens of a view that pass through the model when it shares nothing."""
    return len(view.prompt_ids) + len(view.response_ids) - 1


def plan_bundles(views: Sequence[ScoringView], data_parallel_size: int, limit: int, model: CostModel) -> tuple[list[Bundle], Plan]:
    """Bundles, and which of them each data-parallel rank's micro-batches hold.

    Large bundles compute less, small ones are easier to balance. They are made smaller until the slowest rank is within `SLACK` of what no plan can
    beat, the mean of the largest bundles and the costliest view; if it never is, the plan of the fastest slowest rank is taken. Only a single
    longer view exceeds `limit` tokens, where the number of views divides by the ranks. Deterministic.
    """
    for index, view in enumerate(views):
        _check_view(view, index)  # here every rank raises; in `pack` the others would wait for one
    ordered = _Ordered.of(views, model)
    least, best = 0.0, None
    for parts in PARTS:
        bundles = _bundles(ordered, data_parallel_size, limit, parts)
        if best is None:
            least = max(sum(bundle.cost(views, model) for bundle in bundles) / data_parallel_size, *ordered.costs)
        planned = _plan(views, bundles, data_parallel_size, limit, model)
        if best is None or planned[2] < best[2]:
            best = planned
        if best[2] <= (1 + SLACK) * least:
            break
    return best[0], best[1]


def _plan(views: Sequence[ScoringView], bundles: list[Bundle], data_parallel_size: int, limit: int,
          model: CostModel) -> tuple[list[Bundle], Plan, int]:
    """Bundles, their plan, and the slowest rank's cost. Ranks run equally many micro-batches, so a number of bundles that does not divide by the
    ranks can leave some stacked beyond `limit`; then bundles are divided until they fit, at the price of trunks computed twice."""
    divide = 1
    while True:
        tokens, costs = [bundle.tokens(views) for bundle in bundles], [bundle.cost(views, model) for bundle in bundles]
        plan = plan_micro_batches(tokens, costs, data_parallel_size, limit)
        fits = all(len(row) == 1 or sum(tokens[b] for b in row) <= limit for rank in plan for row in rank)
        if fits or len(bundles) == len(views):
            return bundles, plan, max(sum(costs[b] for row in rank for b in row) for rank in plan)
        # Where their number divides by the ranks each can have a row to itself.
        bundles = _divide_largest(bundles, min(divide, -len(bundles) % data_parallel_size, len(views) - len(bundles)))
        divide *= 2


def bundle_views(views: Sequence[ScoringView], data_parallel_size: int, limit: int, model: CostModel, parts: int = 2) -> list[Bundle]:
    """Divide views into bundles so that the model computes the least.

    A bundle shares at least half of its shortest prompt, has at most `limit` tokens and costs at most one of `parts` of a data-parallel rank's fair
    share (larger ones are hard to balance) unless it is a single view. There are at least as many bundles as ranks where there are as many views.
    Deterministic, by the values alone.
    """
    return _bundles(_Ordered.of(views, model), data_parallel_size, limit, parts)


@dataclass(frozen=True, kw_only=True)
class _Ordered:
    """Views sorted by prompt: those that begin alike stand side by side, so a bundle is a run of them."""

    numbers: tuple[int, ...]
    """Which views of the batch."""
    views: tuple[ScoringView, ...]
    common: tuple[int, ...]
    """How many first tokens of its prompt each has in common with the one before it."""
    costs: tuple[int, ...]
    """Of each alone."""
    model: CostModel

    @staticmethod
    def of(views: Sequence[ScoringView], model: CostModel) -> _Ordered:
        numbers = sorted(range(len(views)), key=lambda i: views[i].prompt_ids)
        ordered = tuple(views[i] for i in numbers)
        common = (_common_prefix(a.prompt_ids, b.prompt_ids) for a, b in itertools.pairwise(ordered))
        return _Ordered(numbers=tuple(numbers), views=ordered, common=(0, *common), costs=tuple(map(model.view, ordered)), model=model)


def _bundles(ordered: _Ordered, data_parallel_size: int, limit: int, parts: int) -> list[Bundle]:
    """See `bundle_views`."""
    runs = _best_runs(ordered, limit, -(-sum(ordered.costs) // (parts * data_parallel_size)))
    bundles = [Bundle(indices=tuple(sorted(ordered.numbers[start:end])), trunk=trunk) for start, end, trunk in runs]
    return _divide_largest(bundles, min(data_parallel_size, len(ordered.views)) - len(bundles))


def _divide_largest(bundles: Sequence[Bundle], times: int) -> list[Bundle]:
    """`times` times, the bundle of most views in two halves; there must be one of several. Sorted by the views that they hold."""
    heap = [(-len(bundle.indices), bundle.indices, bundle.trunk) for bundle in bundles]
    heapq.heapify(heap)
    for _ in range(times):
        size, indices, trunk = heapq.heappop(heap)
        middle = -size // 2
        for part in (indices[:middle], indices[middle:]):
            heapq.heappush(heap, (-len(part), part, trunk if len(part) > 1 else 0))
    return sorted((Bundle(indices=indices, trunk=trunk) for _, indices, trunk in heap), key=lambda bundle: bundle.indices)


def _best_runs(ordered: _Ordered, limit: int, share: int) -> list[tuple[int, int, int]]:
    """(start, end, trunk) of the runs that the views are best divided into: dynamic programming over the end of the last one. A run of several
    has at most `limit` tokens and costs at most `share`."""
    views, costs, common, model = ordered.views, ordered.costs, ordered.common, ordered.model
    lengths = [input_length(view) for view in views]
    saved, last = [0], [(0, 0)]  # for the first n views: the most saved, and (start, trunk) of the run that ends there
    for end in range(1, len(views) + 1):
        saved.append(saved[-1])
        last.append((end - 1, 0))
        shortest = len(views[end - 1].prompt_ids)
        trunk, trunk_cost = shortest - 1, model.beginning(shortest - 1)
        tokens, cost = lengths[end - 1], costs[end - 1]
        for start in range(end - 2, -1, -1):
            shortest, tokens, cost = min(shortest, len(views[start].prompt_ids)), tokens + lengths[start], cost + costs[start]
            if (shared := min(trunk, common[start + 1], shortest - 1)) < trunk:
                trunk, trunk_cost = shared, model.beginning(shared)
            others = end - start - 1
            if 2 * trunk < shortest or tokens - others * trunk > limit or cost - others * trunk_cost > share:
                break
            if saved[start] + others * trunk_cost > saved[end]:
                saved[end], last[end] = saved[start] + others * trunk_cost, (start, trunk)
    runs, end = [], len(views)
    while end:
        start, trunk = last[end]
        runs.append((start, end, trunk))
        end = start
    return runs[::-1]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are equal. By slices: a teacher's prompts share thousands."""
    most = min(len(a), len(b))
    if a is b:
        return most
    length, step = 0, 16
    while length + step <= most and a[length : length + step] == b[length : length + step]:
        length, step = length + step, 2 * step
    while step := step // 2:  # fewer than `step` more are equal
        if length + step <= most and a[length : length + step] == b[length : length + step]:
            length += step
    return length


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
        routes=_packed_routes(views, bundles, len(tokens)),
        padding=padding,
    )


def input_places(views: Sequence[ScoringView], bundles: Sequence[Bundle]) -> list[torch.Tensor]:
    """For each view of the row that `pack` makes, in its order: [input length] int64 positions of its input tokens, a shared trunk's included."""
    places, start = [], 0
    for bundle in bundles:
        trunk = torch.arange(start, start + bundle.trunk)
        start += bundle.trunk
        for index in bundle.indices:
            end = start + input_length(views[index]) - bundle.trunk
            places.append(torch.cat([trunk, torch.arange(start, end)]))
            start = end
    return places


def _packed_routes(views: Sequence[ScoringView], bundles: Sequence[Bundle], tokens: int) -> torch.Tensor | None:
    """See MicroBatch.routes."""
    held = [views[index].routes for bundle in bundles for index in bundle.indices]
    known = next((routes for routes in held if routes is not None), None)
    if known is None:
        return None
    packed = torch.full((tokens, known.layers, known.top_k), FREE, dtype=torch.int16)
    for routes, places in reversed(list(zip(held, input_places(views, bundles), strict=True))):  # so that the first one's trunk stays
        if routes is not None:
            packed[places] = torch.from_numpy(routes.array())
    return packed


def _check_view(view: ScoringView, index: int) -> None:
    if not view.prompt_ids or not view.response_ids:
        raise ValueError(f"view {index} has {len(view.prompt_ids)} prompt and {len(view.response_ids)} response tokens; "
                         "scoring needs at least one of each")
