"""The experts' operator in both forms against the formula, autograd and each other. In the model it is held against transformers, in
parallel/test_layouts.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron_antisd.models.experts import Experts, _Grouped, _Sequential

HIDDEN, WIDTH = 16, 8  # rows of 16 bytes in bfloat16, as grouped_mm asks
COUNTS = [[3, 0, 4, 1], [0, 0, 0, 2], [7, 0, 0], [5], [0, 1], [0, 0]]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def inputs(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """x, probs, then first and second weights."""
    total = sum(counts)
    first = [draw(2 * WIDTH, HIDDEN, seed=10 + e, dtype=dtype) for e in range(len(counts))]
    second = [draw(HIDDEN, WIDTH, seed=20 + e, dtype=dtype) for e in range(len(counts))]
    probs_dtype = torch.promote_types(dtype, torch.float32)  # the router's stay fp32
    return draw(total, HIDDEN, seed=1, dtype=dtype), draw(total, seed=2, dtype=probs_dtype), *first, *second


def written_out(counts: list[int], x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    parts = []
    for tokens, scale, first, second in zip(x.split(counts), probs.split(counts), weights[: len(counts)], weights[len(counts) :], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up * scale[:, None], second))
    return torch.cat(parts)


def with_gradients(operator: type[torch.autograd.Function], counts: list[int], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Output, then the gradients of all inputs."""
    out = operator.apply(*tensors[:2], counts, len(counts), *tensors[2:])
    direction = draw(*out.shape, seed=3).detach().to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, direction)]


def expected_with_gradients(counts: list[int], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The same by the formula, in float64 from the same numbers."""
    direction_dtype = tensors[0].dtype
    tensors = tuple(t.detach().double().requires_grad_() for t in tensors)
    out = written_out(counts, *tensors)
    direction = draw(*out.shape, seed=3).detach().to(direction_dtype).double()
    return [out, *torch.autograd.grad(out, tensors, direction, materialize_grads=True)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("operator", "dtype", "tolerance"), [
    (_Sequential, torch.float64, 1e-14), (_Sequential, torch.float32, 1e-6), (_Sequential, torch.bfloat16, 2e-2),
    (_Grouped, torch.float32, 1e-6), (_Grouped, torch.bfloat16, 2e-2)])
def test_values_and_gradients_are_those_of_the_formula(operator: type[torch.autograd.Function], dtype: torch.dtype, tolerance: float,
                                                       counts: list[int]) -> None:
    """Relative to each tensor's norm."""
    tensors = inputs(counts, dtype)
    for mine, exact in zip(with_gradients(operator, counts, tensors), expected_with_gradients(counts, tensors), strict=True):
        assert mine.shape == exact.shape
        assert (mine.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
def test_grouped_equals_sequential(dtype: torch.dtype, tolerance: float, counts: list[int]) -> None:
    """Only the order of sums and, in bfloat16, the last rounding of each product may differ."""
    tensors = inputs(counts, dtype)
    for grouped, sequential in zip(with_gradients(_Grouped, counts, tensors), with_gradients(_Sequential, counts, tensors), strict=True):
        assert grouped.dtype == sequential.dtype
        assert (grouped - sequential).norm() <= tolerance * sequential.norm()


@pytest.mark.parametrize("operator", [_Sequential, _Grouped])
def test_gradients_go_into_megatrons_buffer(operator: type[torch.autograd.Function]) -> None:
    """With `main_grad`, backward adds to it and says so; what autograd gets is a tensor that nobody adds."""
    counts = [3, 0, 2]
    tensors = inputs(counts, torch.float32)
    expected = torch.autograd.grad(written_out(counts, *tensors).sum(), tensors[2:])
    for weight in tensors[2:]:
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False
    operator.apply(*tensors[:2], counts, len(counts), *tensors[2:]).sum().backward()
    for weight, gradient in zip(tensors[2:], expected, strict=True):
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
        torch.testing.assert_close(weight.main_grad, 1 + gradient, rtol=1e-5, atol=1e-5)


def test_what_an_empty_experts_product_holds_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some GPUs leave it unwritten."""
    import megatron_antisd.models.experts as module

    counts, real = [3, 0, 2], F.grouped_mm

    def grouped_mm(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        product = real(a, b, offs=offs)
        if product.dim() == 3:
            product[1] = torch.nan
        return product

    monkeypatch.setattr(module.F, "grouped_mm", grouped_mm)
    tensors = inputs(counts, torch.float32)
    gradients = with_gradients(_Grouped, counts, tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[3 + 1].any() and not gradients[3 + len(counts) + 1].any(), "an expert without tokens has gradient 0"


@pytest.mark.parametrize(("form", "dtype", "tokens", "grouped"), [
    ("auto", torch.bfloat16, 4, False), ("auto", torch.float32, 4, False), ("grouped", torch.float32, 4, True),
    ("grouped", torch.float32, 0, False), ("sequential", torch.bfloat16, 4, False)])
def test_form_follows_from_key_device_and_dtype(form: str, dtype: torch.dtype, tokens: int, grouped: bool) -> None:
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    assert Experts._takes_grouped(SimpleNamespace(form=form), x, WIDTH) is grouped


@pytest.mark.parametrize(("hidden", "width", "dtype", "grouped"), [
    (64, 48, torch.bfloat16, True), (64, 44, torch.bfloat16, False), (60, 48, torch.bfloat16, False), (64, 48, torch.float32, False)])
def test_auto_on_a_gpu_groups_bfloat16_that_is_aligned(hidden: int, width: int, dtype: torch.dtype, grouped: bool) -> None:
    x = SimpleNamespace(shape=(4, hidden), is_cuda=True, dtype=dtype, element_size=lambda: dtype.itemsize)
    assert Experts._takes_grouped(SimpleNamespace(form="auto"), x, width) is grouped


def test_bfloat16_is_rounded_where_the_formula_in_bfloat16_is() -> None:
    """Projection, activation, the product with the fp32 router weight and the output are each rounded to bfloat16, here by torch step by step;
    sums within a product may be taken in another order. Four roundings (2^-9 relative) of the largest output."""
    counts = [30, 0, 41]
    x, probs, *weights = (t.detach() for t in inputs(counts, torch.bfloat16))
    ours = _Sequential.apply(x, probs, counts, 3, *weights)
    parts = []
    for tokens, scale, first, second in zip(x.split(counts), probs.split(counts), weights[:3], weights[3:], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        activation = F.silu(gate) * up
        parts.append(F.linear((activation.float() * scale[:, None]).bfloat16(), second))
    expected = torch.cat(parts)
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert (ours.float() - expected.float()).abs().max() <= 4 * 2**-9 * expected.abs().max()
