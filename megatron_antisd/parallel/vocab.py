"""Log-prob and exact entropy of each token from vocabulary shards, forward and backward, online over blocks of tokens and columns.

With `p = softmax(x)` over the full true vocabulary and `Z = sum_v exp(x_v)`, in nats:

    log_prob = x_target - log Z                 d log_prob / d x_v = [v = target] - p_v
    H        = log Z - sum_v p_v x_v            d H        / d x_v = -p_v (x_v - log Z + H) = -p_v (log p_v + H)

Each rank of `group` holds `V_padded / tp` columns; the padding stands behind the last true column, so a rank may hold padding only.
Padded columns are never read. All statistics are fp32, taken relative to the row's maximum, so logits of any size and `-inf`
logits are safe. A call costs two small all-reduces forward (`[T + 3]` MAX, `[3, T]` SUM) and, in the linear form, one of `[T, H]`
backward. Every rank gets the same results and has to back-propagate the same scalar: the gradients are those of that one scalar.

`parallel.vocab_loss` is the training step's form, which computes nothing twice; `parallel.vocab_shard` what all share.

`linear_log_prob_and_entropy` starts from the output layer's input and weight: of the fp32 logits only one block of some tokens and some columns
exists at a time, small enough to stay in the cache, and backward computes each block again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_antisd.models.gradient import add_matmul, as_factor, finished_weight_gradient, weight_gradient_buffer
from megatron_antisd.parallel import vocab_shard
from megatron_antisd.parallel.vocab_kernels import EXP_FLOOR, TORCH, Kernels
from megatron_antisd.parallel.vocab_shard import (
    Shard,
    check_inputs,
    check_linear_inputs,
    combine,
    empty_statistics,
    in_block,
    logits_block,
    merge,
    rows_statistics,
)

Gradients = tuple[torch.Tensor | None, ...]


def log_prob_and_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    entropy_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of `targets` and entropy, both `[T]` fp32 in nats and bitwise the same on every rank of `group`.

    `logits` `[T, V_padded / tp]`, any floating dtype, is left as it is. `targets` `[T]` int64 are ids of the whole vocabulary,
    `vocab_size` is the number of true ids. A `group` of None is one rank. Without `entropy_grad` the entropy is cut from the graph.

    Raises ValueError for shapes or dtypes that do not fit; for a target outside the vocabulary and shards of different size on
    every rank together, so that none waits for another.
    """
    check_inputs("logits", logits, targets)
    shard = Shard.of(logits.shape[1], vocab_size, group)
    return _LogitsScores.apply(logits, targets, shard, entropy_grad)


def linear_log_prob_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    entropy_grad: bool = True,
    temperature: float = 1.0,
    kernels: Kernels = TORCH,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_prob_and_entropy` of `hidden @ weight.T / temperature`, never holding more than a block of the logits.

    `hidden` `[T, H]` is the same on every rank (after the sequence-parallel gather); its gradient is the full sum over the
    shards, so the gather before it must split the gradient in backward, not reduce it again. `weight` is `[V_padded / tp, H]`.
    Its gradient is added to `weight.main_grad` (fp32 as a rule) where Megatron's DDP provides it, else
    returned through autograd. bf16 on CUDA multiplies in bf16 and accumulates in fp32; on a CPU bf16 is lifted to fp32 first.

    Raises as `log_prob_and_entropy` does, ValueError for a temperature that is not positive and finite, and NonFiniteHiddenError, a
    ValueError that names rank and row, for hidden states that are not finite.
    """
    check_linear_inputs(hidden, weight, targets, temperature)
    shard = Shard.of(weight.shape[0], vocab_size, group)
    return _LinearScores.apply(hidden, weight, targets, shard, temperature, entropy_grad, kernels)


def select_kernels(name: str) -> Kernels:
    """'torch' or 'triton'. Raises ImportError where Triton is not installed."""
    if name == "torch":
        return TORCH
    if name != "triton":
        raise ValueError(f"kernels are {name!r}, expected 'torch' or 'triton'")
    from megatron_antisd.parallel.vocab_triton import TRITON

    return TRITON


@dataclass(frozen=True, kw_only=True)
class _RowGradients:
    """What backward was given and needs for each row."""

    norm: torch.Tensor
    """`[3, T]` fp32, from `merge`."""
    column: torch.Tensor
    """`[T]` int64."""
    log_prob: torch.Tensor
    """`[T]` fp32: the scalar's derivative by each log_prob."""
    target: torch.Tensor
    """`[T]` fp32: the same, but 0 where another shard holds the target."""
    entropy: torch.Tensor | None
    """`[T]` fp32, or None where the scalar does not depend on the entropy."""

    def block(self, logits: torch.Tensor, rows: slice, block: slice) -> torch.Tensor:
        """Gradient of `[c, b]` fp32 logits, in their own memory."""
        peak, log_sum, entropy = self.norm[:, rows, None]  # [c, 1] each
        log_p = logits.sub_(peak).sub_(log_sum).clamp_(min=EXP_FLOOR)
        grad_log_prob = self.log_prob[rows, None]
        if self.entropy is None:
            gradient = log_p.exp_().mul_(-grad_log_prob)
        else:
            p = log_p.exp()
            gradient = log_p.add_(entropy).mul_(self.entropy[rows, None]).add_(grad_log_prob).mul_(p).neg_()
        place, inside = in_block(self.column[rows], block)
        return gradient.scatter_add_(1, place[:, None], torch.where(inside, self.target[rows], 0.0)[:, None])


def _row_gradients(
    ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None, scale: float = 1.0
) -> _RowGradients:
    targets, norm = ctx.saved_tensors[-2:]
    column, owned = ctx.shard.locate(targets)
    # Autograd hands over None for a result the scalar does not depend on.
    log_prob = torch.zeros_like(norm[0]) if grad_log_prob is None else grad_log_prob * scale
    entropy = None if grad_entropy is None else grad_entropy * scale
    return _RowGradients(norm=norm, column=column, log_prob=log_prob, target=log_prob * owned, entropy=entropy)


class _LogitsScores(torch.autograd.Function):
    """logits `[T, V_padded / tp]` -> log_prob `[T]`, entropy `[T]`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: torch.Tensor, targets: torch.Tensor, shard: Shard, entropy_grad: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        column, owned = shard.locate(targets)
        local = empty_statistics(targets)
        for rows, blocks in _blocks(logits, shard):
            local[:, rows] = combine(torch.stack([
                TORCH.statistics(_fp32_copy(logits, rows, block), *in_block(column[rows], block)) for block in blocks]))
        log_prob, norm = merge(local, targets, owned, shard)
        entropy = norm[2].clone()
        _remember(ctx, (logits, targets, norm), shard, None if entropy_grad else entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Gradients:
        logits = ctx.saved_tensors[0]
        given = _row_gradients(ctx, grad_log_prob, grad_entropy)
        grad_logits = torch.zeros_like(logits)  # [T, V_padded / tp], in the logits' dtype; padded columns stay 0
        for rows, blocks in _blocks(logits, ctx.shard):
            for block in blocks:
                grad_logits[rows, block] = given.block(_fp32_copy(logits, rows, block), rows, block)
        return grad_logits, None, None, None


class _LinearScores(torch.autograd.Function):
    """hidden `[T, H]`, weight `[V_padded / tp, H]` -> log_prob `[T]`, entropy `[T]`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        shard: Shard, temperature: float, entropy_grad: bool, kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        column, owned = shard.locate(targets)
        local = empty_statistics(targets)
        for rows, blocks in _blocks(hidden, shard):
            local[:, rows] = combine(rows_statistics(hidden[rows], weight, column[rows], blocks, temperature, kernels))
        log_prob, norm = merge(local, targets, owned, shard, hidden)
        entropy = norm[2].clone()
        _remember(ctx, (hidden, weight, targets, norm), shard, None if entropy_grad else entropy)
        ctx.temperature = temperature
        ctx.parameter = weight  # the object that carries Megatron's attributes; a saved tensor need not be that object again
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_log_prob: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Gradients:
        hidden, weight = ctx.saved_tensors[:2]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        given = _row_gradients(ctx, grad_log_prob, grad_entropy, scale=1.0 / ctx.temperature)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None  # [T, H]
        weight_total = weight_gradient_buffer(ctx.parameter) if needs_weight else None  # [V_padded / tp, H]
        for rows, blocks in _blocks(hidden, ctx.shard):
            rows_total = torch.zeros_like(hidden[rows], dtype=torch.float32)
            for block in blocks:
                logits = logits_block(hidden[rows], weight, block, ctx.temperature)
                gradient = as_factor(given.block(logits, rows, block), weight.dtype)  # [c, b]
                if grad_hidden is not None:
                    add_matmul(rows_total, gradient, weight[block])
                if weight_total is not None:
                    add_matmul(weight_total[block], gradient.t(), hidden[rows])
            if grad_hidden is not None:
                grad_hidden[rows] = rows_total
        if grad_hidden is not None:
            ctx.shard.all_reduce(grad_hidden, dist.ReduceOp.SUM)  # in hidden's dtype, as Megatron's own output layer does
        grad_weight = None if weight_total is None else finished_weight_gradient(ctx.parameter, weight_total)
        return grad_hidden, grad_weight, None, None, None, None, None


def _blocks(tensor: torch.Tensor, shard: Shard) -> list[tuple[slice, list[slice]]]:
    """Rows of `tensor` `[T, ...]` and their blocks of columns; nothing where this rank holds padding only."""
    size = vocab_shard.BLOCK_BYTES[tensor.device.type]
    chunks = [(rows, shard.blocks(rows.stop - rows.start, size)) for rows in shard.row_chunks(len(tensor), vocab_shard.BLOCK_TOKENS)]
    return [chunk for chunk in chunks if chunk[1]]


def _remember(ctx: FunctionCtx, tensors: tuple[torch.Tensor, ...], shard: Shard, cut_off: torch.Tensor | None) -> None:
    """What both forms keep for backward; `cut_off` is a result without gradient."""
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # None instead of zeros saves backward the entropy's part
    ctx.shard = shard
    if cut_off is not None:
        ctx.mark_non_differentiable(cut_off)


def _fp32_copy(logits: torch.Tensor, rows: slice, block: slice) -> torch.Tensor:
    """`[c, b]` fp32, always memory of its own: the caller's logits must not change."""
    return logits[rows, block].to(torch.float32, copy=True)
