"""Exact statistics of values that lie on several ranks, without gathering them.

The lower median is a radix selection on the integer image of fp32, an order-preserving one: every round each rank counts its values by
their next digit, the counts are summed, and the digit of the median follows. Counts are integers, so the result is exact and does not
depend on which rank holds what. A rank sends some tens of KB, however many values there are.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

DIGITS = (11, 11, 10)
"""Bits of each round's digit. Two rounds of 16 take as long and send 25 times as much."""


def lower_median(values: torch.Tensor, group: dist.ProcessGroup | None) -> float | None:
    """The lower median of the `values` ([n] float32, each rank's own, n may be 0) of all ranks of `group`, the same on each; None where there
    are no values at all, NaN where any of them is not finite. -0.0 counts as 0.0. Collective over `group`; None is this rank alone.
    Raises TypeError for another dtype.
    """
    if values.dtype != torch.float32:
        raise TypeError(f"lower_median takes float32 values, got {values.dtype}; convert them first")
    image = _image(values.detach().reshape(-1))
    broken = (~values.isfinite()).sum()
    remaining, found, rank = 32, 0, 0
    for bits in DIGITS:
        remaining -= bits
        digits = (image >> remaining) & ((1 << bits) - 1)
        counts = torch.bincount(digits, minlength=1 << bits)
        if remaining + bits == 32:  # the first round: how many values there are, and whether all are numbers
            counts = _sum(torch.cat([counts, broken[None]]), group)
            counts, broken = counts[:-1], counts[-1]
            total = int(counts.sum())
            if broken:
                return math.nan
            if total == 0:
                return None
            rank = (total - 1) // 2
        else:
            counts = _sum(counts, group)
        up_to = counts.cumsum(0)  # values whose digit is at most this one
        digit = int(torch.searchsorted(up_to, rank, right=True))
        rank -= int(up_to[digit] - counts[digit])
        found = found << bits | digit
        image = image[digits == digit]
    return _value(found)


def _image(values: torch.Tensor) -> torch.Tensor:
    """int32 whose 32 bits, read as an unsigned number, rise with the value."""
    bits = values.view(torch.int32)
    bits = bits.masked_fill(bits == -(1 << 31), 0)  # -0.0; by its bits, since arithmetic may flush denormals
    # Negative numbers rise as their bits fall. The sign bit is turned around: positive numbers come last.
    return torch.where(bits < 0, ~bits, bits ^ -(1 << 31))


def _value(image: int) -> float:
    """The inverse of `_image`, from the unsigned number."""
    bits = image ^ (1 << 31) if image >> 31 else ~image & 0xFFFFFFFF
    return float(torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32))


def _sum(counts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Over the ranks of `group`; on the CPU, where each number is looked at."""
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts.cpu()
