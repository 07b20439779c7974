"""One rank's columns of the vocabulary: statistics of logits by blocks of columns, and the same over all ranks. `parallel.vocab` has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_antisd.models.gradient import matmul_fp32
from megatron_antisd.parallel.vocab_kernels import EXP_FLOOR, Kernels, finite_peak

DEFAULT_CHUNK_BYTES = 512 << 20
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
"""fp32 logits that are worked on between two products: about what stays in the cache of a CPU core (measured) or of a GPU (not measured)."""
KEPT_BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 32 << 20}
"""The same where they are kept for the gradient: every block adds to the hidden states' gradient, so fewer and wider ones are faster."""
BLOCK_TOKENS, BLOCK_COLUMNS = 512, 512
"""Most rows of a block whose logits are not kept, and fewest columns: products of narrower blocks are slow."""
COLUMN_MULTIPLE = 128
"""Of a block's columns, for matrix units, which want aligned rows."""


class NonFiniteHiddenError(ValueError):
    """Hidden states hold NaN or infinity; `row` is the first one's number."""

    def __init__(self, row: int, rows: int) -> None:
        super().__init__(f"rank {_rank()}: hidden states are not finite, first in row {row} of {rows}; the weights or an earlier layer's "
                         "activations are not finite either")
        self.row = row


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

    @property
    def is_split(self) -> bool:
        return self.group is not None and dist.get_world_size(self.group) > 1

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp) -> None:
        if self.is_split:
            dist.all_reduce(tensor, op=op, group=self.group)

    def chunk_tokens(self, chunk_bytes: int) -> int:
        """Tokens whose fp32 logits take at most `chunk_bytes`, the same on every rank. Raises ValueError where that is none."""
        row = 4 * self.columns
        if chunk_bytes < row:
            raise ValueError(f"chunk_bytes is {chunk_bytes}, too small for one token, whose logits take {row} bytes ({self.columns} columns of "
                             f"this rank, fp32); give at least that (in a configuration: trainer.vocab_chunk_bytes)")  # fmt: skip
        return chunk_bytes // row

    def row_chunks(self, tokens: int, size: int) -> list[slice]:
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def blocks(self, rows: int, block_bytes: int) -> list[slice]:
        """True columns of each block for `rows` rows; none where this rank holds padding only."""
        width = max(BLOCK_COLUMNS, block_bytes // (4 * max(rows, 1)))
        width = -(-self.true_columns // max(1, -(-self.true_columns // width)))  # no narrow last one
        width += -width % COLUMN_MULTIPLE
        return [slice(start, min(start + width, self.true_columns)) for start in range(0, self.true_columns, max(width, 1))]

    def locate(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local column of each target `[T]`, some valid column where another rank holds it, and whether it is ours `[T]` bool."""
        column = targets - self.start
        owned = (column >= 0) & (column < self.true_columns)
        return column.clamp_(0, max(self.true_columns - 1, 0)), owned


def in_block(column: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """`[c]` local columns -> their places in the block `[c]` (some valid one where outside), and whether they are inside `[c]` bool."""
    place = column - block.start
    width = block.stop - block.start
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def logits_block(hidden: torch.Tensor, weight: torch.Tensor, block: slice, temperature: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """`[c, H]` and `[columns, H]` -> `[c, b]` fp32 logits of the block's columns, divided by the temperature."""
    logits = matmul_fp32(hidden, weight[block].t(), out=out)
    return logits if temperature == 1.0 else logits.div_(temperature)


def rows_statistics(
    hidden: torch.Tensor, weight: torch.Tensor, column: torch.Tensor, blocks: list[slice], temperature: float, kernels: Kernels,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Statistics `[n, 4, c]` of the n blocks of some rows' logits; their exponentials stay in `keep` `[c, true columns]` where given."""
    # Memory for all blocks at once and one block's logits for all: results of each block left between blocks would tear the heap.
    parts = torch.empty(len(blocks), 4, len(hidden), dtype=torch.float32, device=hidden.device)
    widest = max(block.stop - block.start for block in blocks)
    memory = torch.empty(len(hidden) * widest, dtype=torch.float32, device=hidden.device) if keep is None else None
    for part, block in zip(parts, blocks, strict=True):
        width = block.stop - block.start
        out = keep[:, block] if memory is None else memory[: len(hidden) * width].view(-1, width)
        part.copy_(kernels.statistics(logits_block(hidden, weight, block, temperature, out=out), *in_block(column, block)))
    return parts


def combine(parts: torch.Tensor) -> torch.Tensor:
    """Statistics `[n, 4, c]` of n blocks -> `[4, c]` of all their columns."""
    peak = parts[:, 0].amax(dim=0)
    sums = _sums_around(peak, parts[:, 0], parts[:, 1], parts[:, 2])
    return torch.stack([peak, *(s.sum(dim=0) for s in sums), parts[:, 3].sum(dim=0)])


def merge(local: torch.Tensor, targets: torch.Tensor, owned: torch.Tensor, shard: Shard,
          hidden: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Every shard's statistics `[4, T]` -> log_prob `[T]` and what backward needs `[3, T]`: maximum, log Z - maximum, entropy.
    Raises as `check_agreement`, and NonFiniteHiddenError for the hidden states the logits were made of."""
    # Some numbers travel with the maxima, so that a fault on one rank raises on all of them without a collective of its own.
    header = _header(targets, shard, hidden)
    maxima = torch.cat([local[0], header])
    shard.all_reduce(maxima, dist.ReduceOp.MAX)
    broken = _check_header(maxima[-len(header) :].tolist(), targets, shard)
    if broken is not None:
        raise NonFiniteHiddenError(broken, len(targets))
    return _merge_around(maxima[: -len(header)], local, owned, shard)


def merge_chunk(local: torch.Tensor, owned: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for some rows, whose targets were checked before (`check_agreement`)."""
    peak = local[0].clone()
    shard.all_reduce(peak, dist.ReduceOp.MAX)
    return _merge_around(peak, local, owned, shard)


def check_agreement(targets: torch.Tensor, shard: Shard, hidden: torch.Tensor) -> int | None:
    """The first row of hidden states that is not finite, or None. Raises ValueError on every rank for a target outside the vocabulary or shards
    of different size on one of them."""
    header = _header(targets, shard, hidden)
    shard.all_reduce(header, dist.ReduceOp.MAX)
    return _check_header(header.tolist(), targets, shard)


def _header(targets: torch.Tensor, shard: Shard, hidden: torch.Tensor | None) -> torch.Tensor:
    """`[4]` fp32 whose maximum over the ranks tells: most and fewest columns, targets outside, rows from the first broken one on."""
    invalid = ((targets < 0) | (targets >= shard.vocab_size)).sum()
    tokens = targets.shape[0]
    if hidden is None or not tokens:
        remaining = torch.zeros_like(invalid)
    else:
        broken = ~hidden.isfinite().all(dim=1)
        remaining = torch.where(broken.any(), tokens - broken.int().argmax(), 0)
    return torch.stack([invalid.new_tensor(shard.columns), invalid.new_tensor(-shard.columns), invalid, remaining]).float()


def _merge_around(peak: torch.Tensor, local: torch.Tensor, owned: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
    shifted_target = torch.where(owned, local[3] - peak, 0.0)
    sums = torch.stack([*_sums_around(peak, *local[:3]), shifted_target])  # [3, T]
    shard.all_reduce(sums, dist.ReduceOp.SUM)

    log_sum = sums[0].log()  # log Z - m: kept apart from m, since m + log_sum would lose the digits of log_sum beside a large m
    entropy = log_sum - sums[1] / sums[0]
    return sums[2] - log_sum, torch.stack([peak, log_sum, entropy])


def _sums_around(peak: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor, weighted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of exp(x - m) and (x - m) exp(x - m) for a larger m, `peak`, than the one they were taken around."""
    # x - peak = (x - m) + (m - peak). No term cancels another: both are <= 0.
    shift = (maximum - finite_peak(peak)).clamp_(min=EXP_FLOOR)
    scale = shift.exp()
    return scale * total, scale * (weighted + shift * total)


def _check_header(header: list[float], targets: torch.Tensor, shard: Shard) -> int | None:
    most, least, invalid, remaining = int(header[0]), -int(header[1]), int(header[2]), int(header[3])
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
    return targets.shape[0] - remaining if remaining else None


def empty_statistics(targets: torch.Tensor) -> torch.Tensor:
    """`[4, T]` of a shard without any column: the neutral elements of the merge."""
    local = torch.zeros(4, targets.shape[0], dtype=torch.float32, device=targets.device)
    local[0] = -math.inf
    return local


def check_inputs(name: str, tensor: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises ValueError for shapes and dtypes that do not fit."""
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected a floating-point tensor of two dimensions [T, ...]")
    if targets.shape != tensor.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {tuple(targets.shape)} {targets.dtype}, expected ({tensor.shape[0]},) torch.int64: one global id "
                         f"for each row of {name} {tuple(tensor.shape)}")  # fmt: skip


def check_linear_inputs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float) -> None:
    """The same where logits are a product."""
    check_inputs("hidden", hidden, targets)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}, expected [V_padded / tp, {hidden.shape[1]}] {hidden.dtype} "
                         f"to go with hidden {tuple(hidden.shape)}; cast or transpose one of them")  # fmt: skip
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a positive finite number; greedy decoding has no entropy to score")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
