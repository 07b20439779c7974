"""The output layer with the policy's loss: no logits are kept and none computed twice.

All that a token's loss needs besides its log-prob is known before the forward pass (old log-prob, teacher, advantage of its sequence, global
denominator). So as soon as a chunk of logits is there, so is the loss's derivative by each log-prob, and the gradients to hidden states
and weight are formed on the spot: three products with the weight instead of the four of scoring, forgetting and scoring again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_antisd.models.gradient import add_matmul, finished_weight_gradient, matmul_fp32, weight_gradient_buffer
from megatron_antisd.parallel.vocab_shard import (
    Shard,
    check_agreement,
    check_linear_inputs,
    chunk_statistics,
    empty_statistics,
    merge_chunk,
)

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
    chunk_tokens: int = 1024,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, log_prob `[T]`, entropy `[T]`), fp32 and the same on every rank of `group`; only the loss has a gradient.

    As `linear_log_prob_and_entropy` followed by `token_loss` on all its log-probs, to rounding; the other arguments are the same. The weight's
    gradient is added to `weight.main_grad`, where Megatron provides it, in the forward pass already. Hence the loss must be
    back-propagated once, with a factor of 1: another one raises RuntimeError (on a GPU a device-side assertion).

    Raises ValueError as `linear_log_prob_and_entropy` does.
    """
    check_linear_inputs(hidden, weight, targets, chunk_tokens, temperature)
    shard = Shard.of(weight.shape[0], vocab_size, group)
    check_agreement(targets, shard)
    return _PolicyLoss.apply(hidden, weight, targets, shard, token_loss, chunk_tokens, temperature)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, shard: Shard, token_loss: TokenLoss,
        chunk_tokens: int, temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        tokens, true_weight = targets.shape[0], weight[: shard.true_columns]
        column, owned = shard.locate(targets)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None  # [T, H]
        weight_total = weight_gradient_buffer(weight) if needs_weight else None  # [V_padded / tp, H]
        log_prob, entropy = torch.empty(2, tokens, dtype=torch.float32, device=hidden.device)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, tokens, chunk_tokens):  # ranks of padding only take part in the collectives
            rows = slice(start, min(start + chunk_tokens, tokens))
            local, exponential = empty_statistics(targets[rows]), None
            if shard.true_columns:
                logits = matmul_fp32(hidden[rows], true_weight.t()).div_(temperature)  # [c, true columns]
                local, exponential = chunk_statistics(logits, column[rows])
                del logits
            log_prob[rows], norm = merge_chunk(local, owned[rows], shard)
            entropy[rows] = norm[2]
            part, slope = _value_and_slope(token_loss, rows, log_prob[rows])
            loss += part
            if exponential is None:
                continue
            slope = slope / temperature
            # p = exp(x - m_r) exp(m_r - m) / Z, in the memory of the exponentials; gradient of the logits: slope ([v = target] - p)
            scale = (local[0] - norm[0]).exp() * (-norm[1]).exp()
            grad_logits = exponential.mul_((-slope * scale)[:, None]).scatter_add_(1, column[rows, None], (slope * owned[rows])[:, None])
            if grad_hidden is not None:
                grad_hidden[rows] = matmul_fp32(grad_logits, true_weight)
            if weight_total is not None:
                add_matmul(weight_total[: shard.true_columns], grad_logits.t(), hidden[rows])
            del exponential, grad_logits
        if grad_hidden is not None:
            shard.all_reduce(grad_hidden, dist.ReduceOp.SUM)  # in hidden's dtype, as Megatron's own output layer does
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
        return grad_hidden, grad_weight, None, None, None, None, None


def _value_and_slope(token_loss: TokenLoss, rows: slice, log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' loss and its derivative by each log-prob."""
    leaf = log_prob.detach().requires_grad_()
    with torch.enable_grad():
        loss = token_loss(rows, leaf)
    (slope,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slope
