"""The output layer with the policy's loss: no logits are kept and none computed twice.

All that a token's loss needs besides its log-prob is known before the forward pass (old log-prob, teacher, advantage of its sequence, global
denominator). So as soon as a chunk of logits is there, so is the loss's derivative by each log-prob, and the gradients to hidden states
and weight are formed on the spot: three products with the weight instead of the four of scoring, forgetting and scoring again.

A chunk holds the logits of as many tokens as fit in `chunk_bytes`. Each block of its columns goes twice through the cache: from the product to
exp(x - its maximum), and, when the token's statistics are known, from there to the gradient and the two products with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_antisd.models.gradient import add_matmul, finished_weight_gradient, weight_gradient_buffer
from megatron_antisd.parallel import vocab_shard
from megatron_antisd.parallel.vocab_kernels import EXP_FLOOR, TORCH, Kernels
from megatron_antisd.parallel.vocab_shard import (
    DEFAULT_CHUNK_BYTES,
    NonFiniteHiddenError,
    Shard,
    check_agreement,
    check_linear_inputs,
    combine,
    empty_statistics,
    in_block,
    merge_chunk,
    rows_statistics,
)

_log = logging.getLogger(__name__)

TokenLoss = Callable[[slice, torch.Tensor], torch.Tensor]
"""(rows, their log-probs `[c]` fp32 with gradient) -> the sum of their losses, a scalar; pure, called once for every chunk in order."""


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    token_loss: TokenLoss,
    *,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    temperature: float = 1.0,
    kernels: Kernels = TORCH,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log_prob `[T]`, entropy `[T]`), fp32 and the same on every rank of `group`; only the loss has a gradient.

    As `linear_log_prob_and_entropy` followed by `token_loss` on all its log-probs, to rounding; the other arguments are the same. `chunk_bytes`
    bounds the fp32 logits that exist at once. The weight's gradient is added to `weight.main_grad`, where Megatron provides it, in the forward
    pass already. Hence the loss must be back-propagated once, with a factor of 1: another one raises RuntimeError (on a GPU a
    device-side assertion).

    Raises ValueError as `linear_log_prob_and_entropy` does, and for a `chunk_bytes` too small for one token. Hidden states that are not finite
    are not an error here, since a training step with a loss that is not finite is skipped as a whole: they are named in a warning.
    """
    check_linear_inputs(hidden, weight, targets, temperature)
    shard = Shard.of(weight.shape[0], vocab_size, group)
    chunk_tokens = shard.chunk_tokens(chunk_bytes)
    broken = check_agreement(targets, shard, hidden)
    if broken is not None:
        _log.warning("%s; the loss of this step will not be finite", NonFiniteHiddenError(broken, len(targets)))
    return _PolicyLoss.apply(hidden, weight, targets, shard, token_loss, chunk_tokens, temperature, kernels)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shard: Shard, token_loss: TokenLoss,
        chunk_tokens: int, temperature: float, kernels: Kernels,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        tokens = targets.shape[0]
        column, owned = shard.locate(targets)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None  # [T, H]
        weight_total = weight_gradient_buffer(weight) if needs_weight else None  # [V_padded / tp, H]
        log_prob, entropy = torch.empty(2, tokens, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        reductions: list[dist.Work] = []
        for rows in shard.row_chunks(tokens, chunk_tokens):  # ranks of padding only take part in the collectives
            chunk = _Chunk(hidden[rows], weight, column[rows], owned[rows], shard, temperature, kernels)
            log_prob[rows], entropy[rows] = chunk.scores()
            part, slope = _value_and_slope(token_loss, rows, log_prob[rows])
            loss += part
            total = chunk.gradients(slope / temperature, needs_hidden, weight_total)
            del chunk  # or its logits would still be there while the next one's are made
            if grad_hidden is not None:
                grad_hidden[rows] = total
                if shard.is_split:  # beside the next chunk's products; in hidden's dtype, as Megatron's own output layer does
                    reductions.append(dist.all_reduce(grad_hidden[rows], group=shard.group, async_op=True))
        for reduction in reductions:
            reduction.wait()
        ctx.parameter, ctx.weight_total = weight, weight_total
        ctx.save_for_backward(*([grad_hidden] if grad_hidden is not None else []))
        ctx.mark_non_differentiable(log_prob, entropy)
        return loss, log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, factor: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        torch._assert_async(factor == 1, "the policy loss was scaled after its gradients were formed; scale token_loss instead")
        grad_hidden = ctx.saved_tensors[0] if ctx.saved_tensors else None
        grad_weight = None if ctx.weight_total is None else finished_weight_gradient(ctx.parameter, ctx.weight_total)
        ctx.weight_total = None
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _Chunk:
    """Some tokens from their logits to their part of the gradients."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, column: torch.Tensor, owned: torch.Tensor, shard: Shard, temperature: float,
                 kernels: Kernels) -> None:
        self._hidden, self._weight, self._column, self._owned, self._shard, self._kernels = hidden, weight, column, owned, shard, kernels
        self._blocks = shard.blocks(len(hidden), vocab_shard.KEPT_BLOCK_BYTES[hidden.device.type])
        self._exponential = torch.empty(len(hidden), shard.true_columns, dtype=torch.float32, device=hidden.device)
        """[c, true columns]: exp(x - the maximum of the block)."""
        self._parts = rows_statistics(hidden, weight, column, self._blocks, temperature, kernels, self._exponential) if self._blocks else None

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-prob and entropy, `[c]` each. Collective."""
        local = combine(self._parts) if self._parts is not None else empty_statistics(self._column)
        log_prob, self._norm = merge_chunk(local, self._owned, self._shard)
        return log_prob, self._norm[2]

    def gradients(self, slope: torch.Tensor, needs_hidden: bool, weight_total: torch.Tensor | None) -> torch.Tensor | None:
        """This shard's part of the hidden states' gradient `[c, H]` fp32; the weight's is added to `weight_total`. `slope` `[c]`: the loss's
        derivative by each log-prob, over the temperature. Uses the logits up."""
        total = torch.zeros_like(self._hidden, dtype=torch.float32) if needs_hidden else None
        # p = exp(x - m_b) exp(m_b - m) / Z; gradient of the logits: slope ([v = target] - p)
        base, at_target = -slope * (-self._norm[1]).exp(), slope * self._owned
        for block, part in zip(self._blocks, self._parts if self._parts is not None else (), strict=True):
            scale = base * (part[0] - self._norm[0]).clamp_(min=EXP_FLOOR).exp()
            place, inside = in_block(self._column, block)
            factor = self._kernels.gradient(self._exponential[:, block], scale, place, torch.where(inside, at_target, 0.0), self._weight.dtype)
            if total is not None:
                add_matmul(total, factor, self._weight[block])
            if weight_total is not None:
                add_matmul(weight_total[block], factor.t(), self._hidden)
        return total


def _value_and_slope(token_loss: TokenLoss, rows: slice, log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' loss and its derivative by each log-prob."""
    leaf = log_prob.detach().requires_grad_()
    with torch.enable_grad():
        loss = token_loss(rows, leaf)
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope
