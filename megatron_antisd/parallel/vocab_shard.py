"""One rank's columns of the vocabulary: statistics of a chunk of logits, and the same over all ranks. See `parallel.vocab` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

EXP_FLOOR = -1000.0
"""Stands for -inf where a shifted logit is multiplied by its exponential: exp(-1000) is 0 in fp32, and 0 * -1000 is not NaN."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which columns of the vocabulary this rank holds."""

    group: dist.ProcessGroup | None
    columns: int
    """V_padded / tp, the padding included."""
    start: int
    """Global id of the first column."""
    true_columns: int
    """How many of the columns belong to the true vocabulary; the rest, behind them, is padding."""
    vocab_size: int

    @classmethod
    def of(cls, columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> Shard:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}, expected the number of true ids, at least 1")
        start = 0 if group is None else dist.get_rank(group) * columns
        return cls(group=group, columns=columns, start=start, true_columns=min(max(vocab_size - start, 0), columns), vocab_size=vocab_size)

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp) -> None:
        if self.group is not None and dist.get_world_size(self.group) > 1:
            dist.all_reduce(tensor, op=op, group=self.group)

    def chunks(self, tokens: int, chunk_tokens: int) -> Iterator[slice]:
        """Rows of each chunk; none where this rank holds padding only."""
        if self.true_columns:
            for start in range(0, tokens, chunk_tokens):
                yield slice(start, min(start + chunk_tokens, tokens))

    def locate(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local column of each target `[T]`, some valid column where another rank holds it, and whether it is ours `[T]` bool."""
        column = targets - self.start
        owned = (column >= 0) & (column < self.true_columns)
        return column.clamp_(0, max(self.true_columns - 1, 0)), owned


def chunk_statistics(logits: torch.Tensor, column: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[c, columns]` fp32 logits of one shard, overwritten, and `column` `[c]` -> `[4, c]`:
    maximum m, sum exp(x - m), sum (x - m) exp(x - m), the logit at `column`; and `[c, columns]` exp(x - m)."""
    peak = logits.amax(dim=1)
    at_column = logits.gather(1, column[:, None]).squeeze(1)
    # A row of -inf alone has no maximum to subtract: leave it, its sums are 0.
    logits.sub_(peak.masked_fill(peak == -math.inf, 0.0)[:, None]).clamp_(min=EXP_FLOOR)
    exponential = logits.exp()
    return torch.stack([peak, exponential.sum(dim=1), torch.linalg.vecdot(logits, exponential), at_column]), exponential


def merge(local: torch.Tensor, targets: torch.Tensor, owned: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Every shard's statistics `[4, T]` -> log_prob `[T]` and what backward needs `[3, T]`: maximum, log Z - maximum, entropy."""
    # Three numbers travel with the maxima, so that a fault on one rank raises on all of them without a collective of its own.
    maxima = torch.cat([local[0], _header(targets, shard)])  # [T + 3]
    shard.all_reduce(maxima, dist.ReduceOp.MAX)
    _check_header(maxima[-3:].tolist(), targets, shard)
    return _merge_around(maxima[:-3], local, owned, shard)


def merge_chunk(local: torch.Tensor, owned: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for some rows, whose targets were checked before (`check_agreement`)."""
    peak = local[0].clone()
    shard.all_reduce(peak, dist.ReduceOp.MAX)
    return _merge_around(peak, local, owned, shard)


def check_agreement(targets: torch.Tensor, shard: Shard) -> None:
    """Raises ValueError on every rank for a target outside the vocabulary or shards of different size on one of them."""
    header = _header(targets, shard)
    shard.all_reduce(header, dist.ReduceOp.MAX)
    _check_header(header.tolist(), targets, shard)


def _header(targets: torch.Tensor, shard: Shard) -> torch.Tensor:
    """`[3]` fp32 whose maximum over the ranks tells."""
    invalid = ((targets < 0) | (targets >= shard.vocab_size)).sum()
    return torch.stack([invalid.new_tensor(shard.columns), invalid.new_tensor(-shard.columns), invalid]).float()


def _merge_around(peak: torch.Tensor, local: torch.Tensor, owned: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    # From this shard's maximum m_r to the global m: x - m = (x - m_r) + (m_r - m). No term cancels another: both are <= 0.
    shift = (local[0] - peak).clamp_(min=EXP_FLOOR)
    scale = shift.exp()
    shifted_target = torch.where(owned, local[3] - peak, 0.0)
    sums = torch.stack([scale * local[1], scale * (local[2] + shift * local[1]), shifted_target])  # [3, T]
    shard.all_reduce(sums, dist.ReduceOp.SUM)

    log_sum = sums[0].log()  # log Z - m: kept apart from m, since m + log_sum would lose the digits of log_sum beside a large m
    entropy = log_sum - sums[1] / sums[0]
    return sums[2] - log_sum, torch.stack([peak, log_sum, entropy])


def _check_header(header: list[float], targets: torch.Tensor, shard: Shard) -> None:
    most, least, invalid = int(header[0]), -int(header[1]), int(header[2])
    if most != least:
        raise ValueError(f"vocabulary shards differ in size: {least} to {most} columns, here {shard.columns}; "
                         "pad the vocabulary to a multiple of the tensor-parallel size")  # fmt: skip
    size = 1 if shard.group is None else dist.get_world_size(shard.group)
    if shard.vocab_size > shard.columns * size:
        raise ValueError(f"vocab_size is {shard.vocab_size}, but {size} rank(s) of {shard.columns} columns hold {shard.columns * size}; "
                         "pass the group the vocabulary is split over, or the right number of true ids")  # fmt: skip
    if invalid:
        span = f"here they span {int(targets.min())} to {int(targets.max())}" if targets.numel() else "here there are none"
        raise ValueError(f"{invalid} target(s) lie outside the vocabulary, expected ids from 0 to {shard.vocab_size - 1}; {span}. "
                         "Targets are global ids and never padding")  # fmt: skip


def empty_statistics(targets: torch.Tensor) -> torch.Tensor:
    """`[4, T]` of a shard without any column: the neutral elements of the merge."""
    local = torch.zeros(4, targets.shape[0], dtype=torch.float32, device=targets.device)
    local[0] = -math.inf
    return local


def check_inputs(name: str, tensor: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected a floating-point tensor of two dimensions [T, ...]")
    if targets.shape != tensor.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {tuple(targets.shape)} {targets.dtype}, expected ({tensor.shape[0]},) torch.int64: one global id "
                         f"for each row of {name} {tuple(tensor.shape)}")  # fmt: skip
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1")


def check_linear_inputs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int, temperature: float) -> None:
    """The same where logits are a product."""
    check_inputs("hidden", hidden, targets, chunk_tokens)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}, expected [V_padded / tp, {hidden.shape[1]}] {hidden.dtype} "
                         f"to go with hidden {tuple(hidden.shape)}; cast or transpose one of them")  # fmt: skip
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a positive finite number; greedy decoding has no entropy to score")
