"""The elementwise work on a block of logits: from logits to statistics and exponentials, and from those to the gradient.

`TORCH` runs anywhere. `parallel.vocab_triton` has the same two functions as one kernel each, for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_antisd.models.gradient import as_factor

EXP_FLOOR = -1000.0
"""Stands for -inf where a shifted logit is multiplied by its exponential: exp(-1000) is 0 in fp32, and 0 * -1000 is not NaN."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """Two functions on a block `[c, b]` of fp32 logits, whose rows may lie apart in memory. `place` `[c]` int64 is the target's column of the block,
    any valid one where `inside` `[c]` bool says that it is in another block."""

    statistics: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(logits, place, inside) -> `[4, c]`: maximum m, sum exp(x - m), sum (x - m) exp(x - m), the target's logit or 0. The logits are
    overwritten with exp(x - m)."""
    gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    """(exponentials, scale `[c]`, place, slope `[c]`, dtype of the factors) -> exponentials * scale, plus the slope at the target (0 where the
    target is in another block), as a factor for products with tensors of that dtype. The exponentials are used up."""


def finite_peak(peak: torch.Tensor) -> torch.Tensor:
    """What to subtract: a row of -inf alone has no maximum to subtract, so it is left as it is and its sums are 0."""
    return peak.masked_fill(peak == -math.inf, 0.0)


def _statistics(logits: torch.Tensor, place: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    peak = logits.amax(dim=1)
    at_target = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), 0.0)
    shifted = torch.sub(logits, finite_peak(peak)[:, None]).clamp_(min=EXP_FLOOR)
    torch.exp(shifted, out=logits)
    total = logits.sum(dim=1)
    return torch.stack([peak, total, shifted.mul_(logits).sum(dim=1), at_target])


def _gradient(exponential: torch.Tensor, scale: torch.Tensor, place: torch.Tensor, slope: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return as_factor(exponential.mul_(scale[:, None]).scatter_add_(1, place[:, None], slope[:, None]), dtype)


TORCH = Kernels(statistics=_statistics, gradient=_gradient)
