"""A rank's experts as one operator: no copies of their inputs and outputs, weight gradients straight into Megatron's buffer.

Megatron's `SequentialMLP` holds the parameters and stays the definition. Run expert by expert through its general linear layers it splits
and concatenates, and writes every gradient twice; with many small experts that is a good part of a step.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_antisd.models.gradient import add_matmul, finished_weight_gradient, weight_gradient_buffer


class Experts(SequentialMLP):
    """Gated SiLU experts without biases, one after the other."""

    def forward(self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor,
                permuted_probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T, H] tokens sorted by expert, [E] how many each has, [T] router weights -> [T, H] weighted outputs (a partial sum where an expert is
        split over expert-tensor-parallel ranks)."""
        first = [expert.linear_fc1.weight for expert in self.local_experts]  # [2 F, H], gate above up
        second = [expert.linear_fc2.weight for expert in self.local_experts]  # [H, F]
        counts = tokens_per_expert.tolist()
        return _ExpertsFunction.apply(permuted_local_hidden_states, permuted_probs, counts, len(first), *first, *second), None


class _ExpertsFunction(torch.autograd.Function):
    """y = p W2 (silu(Wg x) * Wu x) for each expert's own tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor, counts: list[int], experts: int, *weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        projected = x.new_empty(x.shape[0], weights[0].shape[0])  # [T, 2 F]
        for rows, first, second in zip(_rows(counts), weights[:experts], weights[experts:], strict=True):
            torch.mm(x[rows], first.t(), out=projected[rows])
            gate, up = projected[rows].chunk(2, dim=-1)
            activation = F.silu(gate).mul_(up)
            torch.mm(_scaled(activation, probs[rows]), second.t(), out=out[rows])
        ctx.save_for_backward(x, probs, projected)
        ctx.counts, ctx.parameters = counts, (weights[:experts], weights[experts:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probs, projected = ctx.saved_tensors
        firsts, seconds = ctx.parameters
        grad_x, grad_probs = torch.empty_like(x), torch.empty_like(probs)
        buffers = [weight_gradient_buffer(weight) for weight in (*firsts, *seconds)]
        grad_out = grad_out.contiguous()
        for number, rows in enumerate(_rows(ctx.counts)):
            gate, up = projected[rows].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            activation = silu * up
            grad = torch.mm(grad_out[rows], seconds[number])  # by the weighted activation, [n, F]
            add_matmul(buffers[len(firsts) + number], grad_out[rows].t(), _scaled(activation, probs[rows]))
            grad_probs[rows] = torch.linalg.vecdot(grad.to(probs.dtype), activation.to(probs.dtype))
            grad = _scaled(grad, probs[rows])
            grad_projected = torch.empty_like(projected[rows])
            grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
            torch.mul(grad, silu, out=grad_up)
            # d silu / d gate = sigmoid + silu (1 - sigmoid)
            torch.mul(grad.mul_(up), silu.mul_(1 - sigmoid).add_(sigmoid), out=grad_gate)
            torch.mm(grad_projected, firsts[number], out=grad_x[rows])
            add_matmul(buffers[number], grad_projected.t(), x[rows])
        weights = [finished_weight_gradient(weight, buffer) for weight, buffer in zip((*firsts, *seconds), buffers, strict=True)]
        return grad_x, grad_probs, None, None, *weights


def _rows(counts: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise([0, *itertools.accumulate(counts)])]


def _scaled(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[n, F] by [n], the product in the router's dtype (fp32), the result in x's."""
    return (x * probs[:, None]).to(x.dtype)
