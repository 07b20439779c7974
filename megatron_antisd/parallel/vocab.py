"""Log-prob and exact entropy of each token from vocabulary shards, forward and backward, chunked over the tokens.

With `p = softmax(x)` over the full true vocabulary and `Z = sum_v exp(x_v)`, in nats:

    log_prob = x_target - log Z                 d log_prob / d x_v = [v = target] - p_v
    H        = log Z - sum_v p_v x_v            d H        / d x_v = -p_v (x_v - log Z + H) = -p_v (log p_v + H)

Each rank of `group` holds `V_padded / tp` columns; the padding stands behind the last true column, so a rank may hold padding only.
Padded columns are never read. All statistics are fp32, taken relative to the row's maximum, so logits of any size and `-inf`
logits are safe. A call costs two small all-reduces forward (`[T + 3]` MAX, `[3, T]` SUM) and, in the linear form, one of `[T, H]`
backward. Every rank gets the same results and has to back-propagate the same scalar: the gradients are those of that one scalar.

`linear_log_prob_and_entropy` starts from the output layer's input and weight: at most `chunk_tokens` rows of fp32 logits exist at a
time, beside one temporary of that size (their exponentials), and backward computes them again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_antisd.models.gradient import add_matmul, finished_weight_gradient, matmul_fp32, weight_gradient_buffer

EXP_FLOOR = -1000.0
"""Stands for -inf where a shifted logit is multiplied by its exponential: exp(-1000) is 0 in fp32, and 0 * -1000 is not NaN."""

Gradients = tuple[torch.Tensor | None, ...]


def log_prob_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    entropy_grad: bool = True,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `targets` and entropy, both `[T]` fp32 in nats and bitwise the same on every rank of `group`.

    `logits` `[T, V_padded / tp]`, any floating dtype, is left as it is. `targets` `[T]` int64 are ids of the whole vocabulary,
    `vocab_size` is the number of true ids. A `group` of None is one rank. Without `entropy_grad` the entropy is cut from the graph.

    Raises ValueError for shapes or dtypes that do not fit; for a target outside the vocabulary and shards of different size on
    every rank together, so that none waits for another.
    """
    _check_inputs("logits", logits, targets, chunk_tokens)
    shard = _Shard.of(logits.shape[1], vocab_size, group)
    return _LogitsScores.apply(logits, targets, shard, chunk_tokens, entropy_grad)


def linear_log_prob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    entropy_grad: bool = True,
    chunk_tokens: int = 1024,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_prob_and_entropy` of `hidden @ weight.T / temperature`, never holding more than `chunk_tokens` rows of logits.

    `hidden` `[T, H]` is the same on every rank (after the sequence-parallel gather); its gradient is the full sum over the
    shards, so the gather before it must split the gradient in backward, not reduce it again. `weight` is `[V_padded / tp, H]`.
    Its gradient is added to `weight.main_grad` (fp32 as a rule) where Megatron's DDP provides it, else
    returned through autograd. bf16 on CUDA multiplies in bf16 and accumulates in fp32; on a CPU bf16 is lifted to fp32 first.

    Raises as `log_prob_and_entropy` does, and ValueError for a temperature that is not positive and finite.
    """
    _check_inputs("hidden", hidden, targets, chunk_tokens)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {tuple(weight.shape)} {weight.dtype}, expected [V_padded / tp, {hidden.shape[1]}] {hidden.dtype} "
                         f"to go with hidden {tuple(hidden.shape)}; cast or transpose one of them")  # fmt: skip
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a positive finite number; greedy decoding has no entropy to score")
    shard = _Shard.of(weight.shape[0], vocab_size, group)
    return _LinearScores.apply(hidden, weight, targets, shard, chunk_tokens, temperature, entropy_grad)


@dataclass(frozen=True, kw_only=True)
class _Shard:
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
    def of(cls, columns: int, vocab_size: int, group: dist.ProcessGroup | None) -> _Shard:
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


def _check_inputs(name: str, tensor: torch.Tensor, targets: torch.Tensor, chunk_tokens: int) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected a floating-point tensor of two dimensions [T, ...]")
    if targets.shape != tensor.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets are {tuple(targets.shape)} {targets.dtype}, expected ({tensor.shape[0]},) torch.int64: one global id "
                         f"for each row of {name} {tuple(tensor.shape)}")  # fmt: skip
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, expected at least 1")


def _chunk_statistics(logits: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """`[c, columns]` fp32 logits of one shard, overwritten, and `column` `[c]` -> `[4, c]`:
    maximum m, sum exp(x - m), sum (x - m) exp(x - m), the logit at `column`."""
    peak = logits.amax(dim=1)
    at_column = logits.gather(1, column[:, None]).squeeze(1)
    # A row of -inf alone has no maximum to subtract: leave it, its sums are 0.
    logits.sub_(peak.masked_fill(peak == -math.inf, 0.0)[:, None]).clamp_(min=EXP_FLOOR)
    exponential = logits.exp()
    return torch.stack([peak, exponential.sum(dim=1), logits.mul_(exponential).sum(dim=1), at_column])


def _merge(local: torch.Tensor, targets: torch.Tensor, owned: torch.Tensor, shard: _Shard) -> tuple[torch.Tensor, torch.Tensor]:
    """Every shard's statistics `[4, T]` -> log_prob `[T]` and what backward needs `[3, T]`: maximum, log Z - maximum, entropy."""
    invalid = ((targets < 0) | (targets >= shard.vocab_size)).sum()
    # Three numbers travel with the maxima, so that a fault on one rank raises on all of them without a collective of its own.
    header = torch.stack([invalid.new_tensor(shard.columns), invalid.new_tensor(-shard.columns), invalid]).to(local.dtype)
    maxima = torch.cat([local[0], header])  # [T + 3]
    shard.all_reduce(maxima, dist.ReduceOp.MAX)
    _check_header(maxima[-3:].tolist(), targets, shard)
    peak = maxima[:-3]

    # From this shard's maximum m_r to the global m: x - m = (x - m_r) + (m_r - m). No term cancels another: both are <= 0.
    shift = (local[0] - peak).clamp_(min=EXP_FLOOR)
    scale = shift.exp()
    shifted_target = torch.where(owned, local[3] - peak, 0.0)
    sums = torch.stack([scale * local[1], scale * (local[2] + shift * local[1]), shifted_target])  # [3, T]
    shard.all_reduce(sums, dist.ReduceOp.SUM)

    log_sum = sums[0].log()  # log Z - m: kept apart from m, since m + log_sum would lose the digits of log_sum beside a large m
    entropy = log_sum - sums[1] / sums[0]
    return sums[2] - log_sum, torch.stack([peak, log_sum, entropy])


def _check_header(header: list[float], targets: torch.Tensor, shard: _Shard) -> None:
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


@dataclass(frozen=True, kw_only=True)
class _RowGradients:
    """What backward was given and needs for each row."""

    norm: torch.Tensor
    """`[3, T]` fp32, from `_merge`."""
    column: torch.Tensor
    """`[T]` int64."""
    log_prob: torch.Tensor
    """`[T]` fp32: the scalar's derivative by each log_prob."""
    target: torch.Tensor
    """`[T]` fp32: the same, but 0 where another shard holds the target."""
    entropy: torch.Tensor | None
    """`[T]` fp32, or None where the scalar does not depend on the entropy."""

    def chunk(self, logits: torch.Tensor, rows: slice) -> torch.Tensor:
        """Gradient of `[c, columns]` fp32 logits, in their own memory."""
        peak, log_sum, entropy = self.norm[:, rows, None]  # [c, 1] each
        log_p = logits.sub_(peak).sub_(log_sum).clamp_(min=EXP_FLOOR)
        grad_log_prob = self.log_prob[rows, None]
        if self.entropy is None:
            gradient = log_p.exp_().mul_(-grad_log_prob)
        else:
            p = log_p.exp()
            gradient = log_p.add_(entropy).mul_(self.entropy[rows, None]).add_(grad_log_prob).mul_(p).neg_()
        return gradient.scatter_add_(1, self.column[rows, None], self.target[rows, None])


def _row_gradients(
    ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, scale: float = 1.0
) -> _RowGradients:
    targets, norm = ctx.saved_tensors[-2:]
    column, owned = ctx.shard.locate(targets)
    # Autograd hands over None for a result the scalar does not depend on.
    log_prob = torch.zeros_like(norm[0]) if grad_log_prob is None else grad_log_prob * scale
    entropy = None if grad_entropy is None else grad_entropy * scale
    return _RowGradients(norm=norm, column=column, log_prob=log_prob, target=log_prob * owned, entropy=entropy)


def _empty_statistics(targets: torch.Tensor) -> torch.Tensor:
    """`[4, T]` of a shard without any column: the neutral elements of the merge."""
    local = torch.zeros(4, targets.shape[0], dtype=torch.float32, device=targets.device)
    local[0] = -math.inf
    return local


class _LogitsScores(torch.autograd.Function):
    """logits `[T, V_padded / tp]` -> log_prob `[T]`, entropy `[T]`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, targets: torch.Tensor, shard: _Shard, chunk_tokens: int, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column, owned = shard.locate(targets)
        local = _empty_statistics(targets)
        for rows in shard.chunks(targets.shape[0], chunk_tokens):
            local[:, rows] = _chunk_statistics(_fp32_copy(logits, rows, shard), column[rows])
        log_prob, norm = _merge(local, targets, owned, shard)
        entropy = norm[2].clone()
        _remember(ctx, (logits, targets, norm), shard, chunk_tokens, None if entropy_grad else entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Gradients:
        logits = ctx.saved_tensors[0]
        given = _row_gradients(ctx, grad_log_prob, grad_entropy)
        grad_logits = torch.zeros_like(logits)  # [T, V_padded / tp], in the logits' dtype; padded columns stay 0
        for rows in ctx.shard.chunks(logits.shape[0], ctx.chunk_tokens):
            grad_logits[rows, : ctx.shard.true_columns] = given.chunk(_fp32_copy(logits, rows, ctx.shard), rows)
        return grad_logits, None, None, None, None


class _LinearScores(torch.autograd.Function):
    """hidden `[T, H]`, weight `[V_padded / tp, H]` -> log_prob `[T]`, entropy `[T]`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        shard: _Shard, chunk_tokens: int, temperature: float, entropy_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        column, owned = shard.locate(targets)
        true_weight = weight[: shard.true_columns]
        local = _empty_statistics(targets)
        for rows in shard.chunks(targets.shape[0], chunk_tokens):
            logits = matmul_fp32(hidden[rows], true_weight.t()).div_(temperature)  # [c, true columns]
            local[:, rows] = _chunk_statistics(logits, column[rows])
            del logits  # or it would still be there while the next chunk's are made
        log_prob, norm = _merge(local, targets, owned, shard)
        entropy = norm[2].clone()
        _remember(ctx, (hidden, weight, targets, norm), shard, chunk_tokens, None if entropy_grad else entropy)
        ctx.temperature = temperature
        ctx.parameter = weight  # the object that carries Megatron's attributes; a saved tensor need not be that object again
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Gradients:
        hidden, weight = ctx.saved_tensors[:2]
        shard, temperature = ctx.shard, ctx.temperature
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        given = _row_gradients(ctx, grad_log_prob, grad_entropy, scale=1.0 / temperature)
        true_weight = weight[: shard.true_columns]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None  # [T, H]
        weight_total = weight_gradient_buffer(ctx.parameter) if needs_weight else None  # [V_padded / tp, H]
        for rows in shard.chunks(hidden.shape[0], ctx.chunk_tokens):
            grad_logits = given.chunk(matmul_fp32(hidden[rows], true_weight.t()).div_(temperature), rows)  # [c, true columns]
            if grad_hidden is not None:
                grad_hidden[rows] = matmul_fp32(grad_logits, true_weight)
            if weight_total is not None:
                add_matmul(weight_total[: shard.true_columns], grad_logits.t(), hidden[rows])
            del grad_logits
        if grad_hidden is not None:
            shard.all_reduce(grad_hidden, dist.ReduceOp.SUM)  # in hidden's dtype, as Megatron's own output layer does
        grad_weight = None if weight_total is None else finished_weight_gradient(ctx.parameter, weight_total)
        return grad_hidden, grad_weight, None, None, None, None, None


def _remember(
    ctx: FunctionCtx, tensors: tuple[torch.Tensor, ...], shard: _Shard, chunk_tokens: int, cut_off: torch.Tensor | None
) -> None:
    """What both forms keep for backward; `cut_off` is a result without gradient."""
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # None instead of zeros saves backward the entropy's part
    ctx.shard, ctx.chunk_tokens = shard, chunk_tokens
    if cut_off is not None:
        ctx.mark_non_differentiable(cut_off)


def _fp32_copy(logits: torch.Tensor, rows: slice, shard: _Shard) -> torch.Tensor:
    """`[c, true columns]` fp32, always memory of its own: the caller's logits must not change."""
    return logits[rows, : shard.true_columns].to(torch.float32, copy=True)
