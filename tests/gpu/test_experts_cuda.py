"""The experts' operator on a GPU in both forms, gradients into Megatron's fp32 buffers, against float64 on the CPU and against each other.
Needs torch (2.10 or newer) and megatron-core alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_antisd.models.experts import _Grouped, _Sequential

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
HIDDEN, WIDTH = 128, 96
COUNTS = [300, 0, 57, 1]
CASES = [(_Sequential, torch.float32, 1e-4), (_Sequential, torch.bfloat16, 2e-2), (_Grouped, torch.bfloat16, 2e-2)]


def written_out(x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    parts, experts = [], len(COUNTS)
    for tokens, scale, first, second in zip(x.split(COUNTS), probs.split(COUNTS), weights[:experts], weights[experts:], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up * scale[:, None], second))
    return torch.cat(parts)


def draw(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """On the CPU: x, probs, first and second weights; and a direction for the backward pass."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    probs = torch.rand(sum(COUNTS), generator=generator)  # the router's stay fp32
    drawn = [normal(sum(COUNTS), HIDDEN), probs, *(normal(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5) for _ in COUNTS),
             *(normal(HIDDEN, WIDTH, scale=WIDTH**-0.5) for _ in COUNTS)]
    return drawn, normal(sum(COUNTS), HIDDEN)


def run(operator: type[torch.autograd.Function], drawn: list[torch.Tensor], direction: torch.Tensor, buffered: bool) -> list[torch.Tensor]:
    """Output, gradients of x, probs and weights."""
    ours = [x.to(DEVICE).requires_grad_() for x in drawn]
    weights = ours[2:]
    if buffered:
        for weight in weights:
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    out = operator.apply(*ours[:2], COUNTS, len(COUNTS), *weights)
    out.backward(direction.to(DEVICE))
    assert not buffered or all(weight.grad_added_to_main_grad for weight in weights)
    return [out.detach(), *(x.grad for x in ours[:2]), *(weight.main_grad if buffered else weight.grad for weight in weights)]


NAMES = ["output", "x", "probs", *(f"{which} weight of expert {e}" for which in ("first", "second") for e in range(len(COUNTS)))]


@pytest.mark.parametrize("buffered", [True, False], ids=["megatrons-buffer", "autograd"])
@pytest.mark.parametrize(("operator", "dtype", "tolerance"), CASES, ids=["sequential-fp32", "sequential-bf16", "grouped-bf16"])
def test_values_and_gradients_as_float64(operator: type[torch.autograd.Function], dtype: torch.dtype, tolerance: float, buffered: bool) -> None:
    drawn, direction = draw(dtype)
    # The oracle starts from the rounded inputs: only the arithmetic is compared.
    theirs = [x.double().requires_grad_() for x in drawn]
    expected = written_out(*theirs)
    wanted = torch.autograd.grad(expected, theirs, direction.double())
    found = run(operator, drawn, direction, buffered)
    assert found[0].dtype == dtype
    for name, mine, exact in zip(NAMES, found, (expected, *wanted), strict=True):
        error = (mine.double().cpu() - exact).norm()
        assert error <= tolerance * exact.norm(), f"{name}: error {error:.1e} of {exact.norm():.1e}"


def test_grouped_equals_sequential() -> None:
    """The order of sums, the last rounding of each product, and the weight gradients' rounding to bfloat16: a few times 2^-9."""
    drawn, direction = draw(torch.bfloat16)
    for name, grouped, sequential in zip(NAMES, run(_Grouped, drawn, direction, True), run(_Sequential, drawn, direction, True), strict=True):
        error = (grouped.double() - sequential.double()).norm()
        assert error <= 2**-7 * sequential.double().norm(), f"{name}: error {error:.1e} of {sequential.double().norm():.1e}"


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="torch's kernel for older GPUs is a loop")
def test_grouped_waits_for_nothing() -> None:
    """Forward and backward, counts on the host as Megatron's dispatcher leaves them: no synchronisation of host and device."""
    drawn, direction = draw(torch.bfloat16)
    ours = [x.to(DEVICE).requires_grad_() for x in drawn]
    on_device = direction.to(DEVICE)
    _Grouped.apply(*ours[:2], COUNTS, len(COUNTS), *ours[2:]).backward(on_device)  # what a first call sets up
    torch.cuda.set_sync_debug_mode("error")
    try:
        _Grouped.apply(*ours[:2], COUNTS, len(COUNTS), *ours[2:]).backward(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
