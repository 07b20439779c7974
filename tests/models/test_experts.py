"""The experts' operator against the formula and autograd. In the model it is held against transformers, in parallel/test_layouts.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_antisd.models.experts import _ExpertsFunction

HIDDEN, WIDTH = 6, 5
COUNTS = [[3, 0, 4, 1], [0, 0, 0, 2], [5], [0, 0]]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def inputs(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, probs, then first and second weights."""
    total = sum(counts)
    first = [draw(2 * WIDTH, HIDDEN, seed=10 + e, dtype=dtype) for e in range(len(counts))]
    second = [draw(HIDDEN, WIDTH, seed=20 + e, dtype=dtype) for e in range(len(counts))]
    return draw(total, HIDDEN, seed=1, dtype=dtype), draw(total, seed=2, dtype=dtype), *first, *second


def written_out(counts: list[int], x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    parts = []
    for tokens, scale, first, second in zip(x.split(counts), probs.split(counts), weights[: len(counts)], weights[len(counts) :], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up * scale[:, None], second))
    return torch.cat(parts)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_values_and_gradients_are_those_of_the_formula(counts: list[int]) -> None:
    """Float64: 1e-12."""
    tensors = inputs(counts)
    ours = _ExpertsFunction.apply(*tensors[:2], counts, len(counts), *tensors[2:])
    expected = written_out(counts, *tensors)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    direction = draw(*ours.shape, seed=3).detach()
    for mine, theirs in zip(torch.autograd.grad(ours, tensors, direction), torch.autograd.grad(expected, tensors, direction, materialize_grads=True),
                            strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_gradients_go_into_megatrons_buffer() -> None:
    """With `main_grad`, backward adds to it and says so; what autograd gets is a tensor that nobody adds."""
    counts = [3, 2]
    tensors = inputs(counts, torch.float32)
    expected = torch.autograd.grad(written_out(counts, *tensors).sum(), tensors[2:])
    for weight in tensors[2:]:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    _ExpertsFunction.apply(*tensors[:2], counts, 2, *tensors[2:]).sum().backward()
    for weight, gradient in zip(tensors[2:], expected, strict=True):
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
        torch.testing.assert_close(weight.main_grad, 1 + gradient, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_where_the_formula_in_bfloat16_is() -> None:
    """Projection, activation, the product with the fp32 router weight and the output are each rounded to bfloat16, here by torch step by step;
    sums within a product may be taken in another order. Four roundings (2^-9 relative) of the largest output."""
    counts = [30, 0, 41]
    x, probs, *weights = (t.detach() for t in inputs(counts, torch.bfloat16))
    probs = probs.float()
    ours = _ExpertsFunction.apply(x, probs, counts, 3, *weights)
    parts = []
    for tokens, scale, first, second in zip(x.split(counts), probs.split(counts), weights[:3], weights[3:], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        parts.append(F.linear((activation.float() * scale[:, None]).bfloat16(), second))
    expected = torch.cat(parts)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert (ours.float() - expected.float()).abs().max() <= 4 * 2**-9 * expected.abs().max()
