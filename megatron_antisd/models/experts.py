"""A rank's experts as one operator: no copies of their inputs and outputs, weight gradients straight into Megatron's buffer.

Megatron's `SequentialMLP` holds the parameters and stays the definition. Run expert by expert through its general linear layers it splits
and concatenates, and writes every gradient twice; with many small experts that is a good part of a step. Two forms, equal to rounding:

* `sequential`: an expert's tokens after another's; every dtype and device.
* `grouped`: all experts in one `torch.nn.functional.grouped_mm`. On a GPU with bfloat16 that is one kernel instead of one an expert.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_antisd.models.gradient import add_matmul, finished_weight_gradient, weight_gradient_buffer

GROUPED_ALIGNMENT = 16
"""Bytes that a row of every operand of `grouped_mm` must be a multiple of."""


class Experts(SequentialMLP):
    """Gated SiLU experts without biases. `form`: `auto`, `grouped` or `sequential`."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, submodules: MLPSubmodules,
                 pg_collection: ProcessGroupCollection | None = None, form: str = "auto") -> None:
        super().__init__(num_local_experts, config, submodules, pg_collection)
        self.form = form

    def forward(self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor,
                permuted_probs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[T, H] tokens sorted by expert, [E] how many each has, [T] router weights -> [T, H] weighted outputs (a partial sum where an expert is
        split over expert-tensor-parallel ranks)."""
        first = [expert.linear_fc1.weight for expert in self.local_experts]  # [2 F, H], gate above up
        second = [expert.linear_fc2.weight for expert in self.local_experts]  # [H, F]
        # On the host already: Megatron's dispatcher brings the counts there to split the tokens, and has waited for them. Nothing waits here.
        counts = tokens_per_expert.tolist()
        operator = _Grouped if self._takes_grouped(permuted_local_hidden_states, second[0].shape[1]) else _Sequential
        return operator.apply(permuted_local_hidden_states, permuted_probs, counts, len(first), *first, *second), None

    def _takes_grouped(self, x: torch.Tensor, width: int) -> bool:
        if not x.shape[0]:
            return False  # kernels for no tokens at all are the least tried ones
        if self.form == "auto":
            return x.is_cuda and x.dtype == torch.bfloat16 and not any(n * x.element_size() % GROUPED_ALIGNMENT for n in (x.shape[1], width))
        return self.form == "grouped"


class _Sequential(torch.autograd.Function):
    """y = p W2 (silu(Wg x) * Wu x) for each expert's own tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor, counts: list[int], experts: int, *weights: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        projected = x.new_empty(x.shape[0], weights[0].shape[0])  # [T, 2 F]
        for rows, first, second in zip(_rows(counts), weights[:experts], weights[experts:], strict=True):
            torch.mm(x[rows], first.t(), out=projected[rows])
            torch.mm(_scaled(_activation(projected[rows]), probs[rows]), second.t(), out=out[rows])
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
            grad = torch.mm(grad_out[rows], seconds[number])
            weighted, grad_projected, grad_probs[rows] = _activation_backward(projected[rows], probs[rows], grad)
            add_matmul(buffers[len(firsts) + number], grad_out[rows].t(), weighted)
            torch.mm(grad_projected, firsts[number], out=grad_x[rows])
            add_matmul(buffers[number], grad_projected.t(), x[rows])
        weights = [finished_weight_gradient(weight, buffer) for weight, buffer in zip((*firsts, *seconds), buffers, strict=True)]
        return grad_x, grad_probs, None, None, *weights


class _Grouped(torch.autograd.Function):
    """The same for all experts at once. Their weights are stacked for each call and not kept: Megatron lays parameters out in the order of the
    backward pass, last expert first, for which torch has no strides. A weight gradient is rounded to the model's dtype before it is added, as
    those of Megatron's own linear layers are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probs: torch.Tensor, counts: list[int], experts: int, *weights: torch.Tensor) -> torch.Tensor:
        ends = _ends(counts, x.device)
        projected = F.grouped_mm(x, torch.stack(weights[:experts]).mT, offs=ends)
        out = F.grouped_mm(_scaled(_activation(projected), probs), torch.stack(weights[experts:]).mT, offs=ends)
        ctx.save_for_backward(x, probs, projected, ends)
        ctx.counts, ctx.parameters = counts, (weights[:experts], weights[experts:])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, probs, projected, ends = ctx.saved_tensors
        firsts, seconds = ctx.parameters
        grad_out = grad_out.contiguous()
        grad = F.grouped_mm(grad_out, torch.stack(seconds), offs=ends)
        weighted, grad_projected, grad_probs = _activation_backward(projected, probs, grad)
        grad_seconds = _weight_gradients(seconds, ctx.counts, grad_out, weighted, ends)
        grad_x = F.grouped_mm(grad_projected, torch.stack(firsts), offs=ends)
        return grad_x, grad_probs, None, None, *_weight_gradients(firsts, ctx.counts, grad_projected, x, ends), *grad_seconds


def _weight_gradients(weights: tuple[torch.Tensor, ...], counts: list[int], grad: torch.Tensor, x: torch.Tensor,
                      ends: torch.Tensor) -> list[torch.Tensor | None]:
    """What backward returns for the weights of y = x W^T, [T, in] -> [T, out], in groups of rows that end at `ends`."""
    # Of the layouts that grouped_mm takes this is the one whose groups may have any length, none included. On Blackwell GPUs it was still seen
    # to return other than zeros for an empty group, so such a product is not read.
    products = F.grouped_mm(grad.t(), x, offs=ends)  # [E, out, in]
    buffers = [weight_gradient_buffer(weight) for weight in weights]
    for count, buffer, product in zip(counts, buffers, products, strict=True):
        if count:
            buffer.add_(product)
    return [finished_weight_gradient(weight, buffer) for weight, buffer in zip(weights, buffers, strict=True)]


def _activation(projected: torch.Tensor) -> torch.Tensor:
    """[n, 2 F], gate beside up -> [n, F]."""
    gate, up = projected.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _activation_backward(projected: torch.Tensor, probs: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From `grad`, the gradient by the weighted activation [n, F]: that activation, and the gradients by `projected` [n, 2 F] and `probs` [n]."""
    gate, up = projected.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    activation = silu * up
    grad_probs = torch.linalg.vecdot(grad.to(probs.dtype), activation.to(probs.dtype))
    weighted, grad = _scaled(activation, probs), _scaled(grad, probs)
    grad_projected = torch.empty_like(projected)
    grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
    torch.mul(grad, silu, out=grad_up)
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    torch.mul(grad.mul_(up), silu.mul_(1 - sigmoid).add_(sigmoid), out=grad_gate)
    return weighted, grad_projected, grad_probs


def _rows(counts: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise([0, *itertools.accumulate(counts)])]


def _ends(counts: list[int], device: torch.device) -> torch.Tensor:
    """[E] int32 where each expert's rows end, on `device`. From pinned memory the copy waits for nothing."""
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, pin_memory=device.type == "cuda")
    return ends.to(device, non_blocking=True)


def _scaled(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """[n, F] by [n], the product in the router's dtype (fp32), the result in x's."""
    return (x * probs[:, None]).to(x.dtype)
