"""Views -> packed micro-batches. The only place that shifts by one token.

A view of prompt p and response r enters the model as `p + r[:-1]`; the hidden state at input position `len(p) - 1 + t`
predicts response token `t`. The last response token is never an input. No padding between sequences: a micro-batch is one row
of concatenated sequences, filled at its end to a multiple of the tensor-parallel size where sequence parallelism needs it.
"""

from __future__ import annotations

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
    micro-batch is empty. A micro-batch holds at most `limit` tokens unless a single sequence is longer.
    Deterministic; longest first into the lightest bin. Returns [data_parallel_size][n_micro] tuples of indices.
    Raises ValueError when there are fewer sequences than ranks.
    """
    if len(costs) < data_parallel_size:
        raise ValueError(f"{len(costs)} sequences cannot be spread over {data_parallel_size} data-parallel ranks; "
                         "each needs at least one")
    longest_first = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    per_rank = _balance(longest_first, costs, data_parallel_size)
    fewest = max(_bins_needed([costs[i] for i in rank], limit) for rank in per_rank)
    fewest = min(fewest, *(len(rank) for rank in per_rank))
    return [[tuple(sorted(group)) for group in _balance(rank, costs, fewest)] for rank in per_rank]


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


def _balance(order: Sequence[int], costs: Sequence[int], bins: int) -> list[list[int]]:
    """Longest-first into the lightest bin that is still short of members, so that no bin stays empty."""
    loads = [0] * bins
    members: list[list[int]] = [[] for _ in range(bins)]
    for position, index in enumerate(order):
        empty = [b for b in range(bins) if not members[b]]
        remaining = len(order) - position
        candidates = empty if len(empty) == remaining else range(bins)
        lightest = min(candidates, key=lambda b: (loads[b], b))
        members[lightest].append(index)
        loads[lightest] += costs[index]
    return members


def _bins_needed(costs: Sequence[int], limit: int) -> int:
    """Fewest bins for which longest-first balancing keeps every multi-member bin within `limit`."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins = max(1, -(-sum(costs) // limit))
    while bins < len(costs):
        packed = _balance(order, costs, bins)
        if all(len(group) == 1 or sum(costs[i] for i in group) <= limit for group in packed):
            break
        bins += 1
    return min(bins, len(costs))
