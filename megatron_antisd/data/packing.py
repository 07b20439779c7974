"""Views -> packed micro-batches. The only place that shifts by one token.

A view of prompt p and response r enters the model as `p + r[:-1]`; the hidden state at input position `len(p) - 1 + t`
predicts response token `t`. The last response token is never an input. No padding between sequences: a micro-batch is one row
of concatenated sequences, filled at its end to a multiple of the tensor-parallel size where sequence parallelism needs it.
"""

from __future__ import annotations

import heapq
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
    predicting: torch.Tensor
    """[R] int64, positions in the row whose hidden state predicts a response token."""
    targets: torch.Tensor
    """[R] int64, those response tokens."""
    padding: int
    """Padding tokens at the end of the row."""


def input_length(view: ScoringView) -> int:
    """Tokens of a view that pass through the model."""
    return len(view.prompt_ids) + len(view.response_ids) - 1


def plan_micro_batches(costs: Sequence[int], data_parallel_size: int, limit: int) -> list[list[tuple[int, ...]]]:
    """Assign sequences of `costs` tokens to data-parallel ranks and micro-batches.

    Every rank gets the same number of micro-batches (experts and pipelines of different ranks meet in collectives) and no
    micro-batch is empty. A micro-batch holds at most `limit` tokens unless a single sequence is longer; where the number of
    sequences does not divide by the ranks there may be too few of them to keep to that.
    Deterministic; longest first into the lightest bin. Returns [data_parallel_size][n_micro] tuples of indices.
    Raises ValueError when there are fewer sequences than ranks.
    """
    if len(costs) < data_parallel_size:
        raise ValueError(f"{len(costs)} sequences cannot be spread over {data_parallel_size} data-parallel ranks; "
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


def pack(views: Sequence[ScoringView], indices: tuple[int, ...], multiple: int, pad_id: int = 0) -> MicroBatch:
    """Concatenate `views[i] for i in indices` into one row whose length is a multiple of `multiple`."""
    tokens: list[int] = []
    lengths: list[int] = []
    predicting: list[torch.Tensor] = []
    targets: list[int] = []
    for index in indices:
        view = views[index]
        if not view.prompt_ids or not view.response_ids:
            raise ValueError(f"view {index} has {len(view.prompt_ids)} prompt and {len(view.response_ids)} response tokens; "
                             "scoring needs at least one of each")
        first = len(tokens) + len(view.prompt_ids) - 1
        predicting.append(torch.arange(first, first + len(view.response_ids)))
        targets.extend(view.response_ids)
        tokens.extend(view.prompt_ids)
        tokens.extend(view.response_ids[:-1])
        lengths.append(input_length(view))
    padding = -len(tokens) % multiple
    if padding:
        tokens.extend([pad_id] * padding)
        lengths.append(padding)
    return MicroBatch(
        indices=tuple(indices),
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        lengths=tuple(lengths),
        predicting=torch.cat(predicting),
        targets=torch.tensor(targets, dtype=torch.int64),
        padding=padding,
    )


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
