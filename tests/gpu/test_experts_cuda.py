"""The experts' operator on a GPU, gradients into Megatron's fp32 buffers, against float64 on the CPU. Needs torch and megatron-core alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_antisd.models.experts import _ExpertsFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
HIDDEN, WIDTH = 128, 96
COUNTS = [300, 0, 57, 1]


def written_out(x: torch.Tensor, probs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    parts, experts = [], len(COUNTS)
    for tokens, scale, first, second in zip(x.split(COUNTS), probs.split(COUNTS), weights[:experts], weights[experts:], strict=True):
        gate, up = F.linear(tokens, first).chunk(2, dim=-1)
        parts.append(F.linear(F.silu(gate) * up * scale[:, None], second))
    return torch.cat(parts)


@pytest.mark.parametrize("buffered", [True, False], ids=["megatrons-buffer", "autograd"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_values_and_gradients_as_float64(dtype: torch.dtype, tolerance: float, buffered: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    probs = torch.rand(sum(COUNTS), generator=generator)  # the router's stay fp32
    drawn = [draw(sum(COUNTS), HIDDEN), probs, *(draw(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5) for _ in COUNTS),
             *(draw(HIDDEN, WIDTH, scale=WIDTH**-0.5) for _ in COUNTS)]
    direction = draw(sum(COUNTS), HIDDEN)
    # The oracle starts from the rounded inputs: only the arithmetic is compared.
    theirs = [x.double().requires_grad_() for x in drawn]
    expected = written_out(*theirs)
    wanted = torch.autograd.grad(expected, theirs, direction.double())

    ours = [x.to(DEVICE).requires_grad_() for x in drawn]
    weights = ours[2:]
    if buffered:
        for weight in weights:
            weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    out = _ExpertsFunction.apply(*ours[:2], COUNTS, len(COUNTS), *weights)
    out.backward(direction.to(DEVICE))
    assert out.dtype == dtype
    assert not buffered or all(weight.grad_added_to_main_grad for weight in weights)
    found = [x.grad for x in ours[:2]] + [weight.main_grad if buffered else weight.grad for weight in weights]
    names = ["output", "x", "probs", *(f"{which} weight of expert {e}" for which in ("first", "second") for e in range(len(COUNTS)))]
    for name, mine, exact in zip(names, (out, *found), (expected, *wanted), strict=True):
        error = (mine.detach().double().cpu() - exact).norm()
        assert error <= tolerance * exact.norm(), f"{name}: error {error:.1e} of {exact.norm():.1e}"
