"""Exact statistics of values that lie scattered over ranks: order statistics, mean and maximum, the same number on every rank.

Order statistics are found without gathering the values. A float32 maps to a 32-bit integer of the same order; its bytes are fixed
from the highest to the lowest, one all-reduce of counts each: four rounds, whatever the number of values. Counts are integers,
so the result is bit-exact under any partition of the values over the ranks. This is what the entropy gate decides on.

Every function takes `values` `[n_local]` float32 (n_local may be 0, and differ between ranks) on the device the group communicates on,
must be called by all ranks of `group` (None: one rank), returns None when no rank has a value, and raises ValueError on every
rank when one rank holds NaN or infinity: a statistic over those would be a number that means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.distributed as dist

BITS_PER_ROUND = 8
LOWEST_KEY = -(2**31)


def global_lower_median(values: torch.Tensor, group: dist.ProcessGroup | None) -> float | None:
    """The middle value over all ranks; for an even count the lower of the two in the middle, never their average."""
    count = _global_count(values, group)
    return _order_statistics(values, [(count - 1) // 2], group)[0] if count else None


def global_quantiles(values: torch.Tensor, qs: Sequence[float], group: dist.ProcessGroup | None) -> tuple[float, ...] | None:
    """The values of rank `floor(q (n - 1))` (0 the smallest) for each q in `qs`, all in one pass: "lower" interpolation, so each
    is one of the values and q = 0.5 the lower median. A q counts as the decimal it is written as: 0.29 of 101 values is rank 29,
    although the double below 0.29 times 100 is less than 29.

    Raises ValueError for a q outside [0, 1].
    """
    outside = [q for q in qs if not 0.0 <= q <= 1.0]
    if outside:
        raise ValueError(f"quantiles {outside} lie outside [0, 1]; give fractions, 0.9 for the 90th percentile")
    count = _global_count(values, group)
    if not count:
        return None
    return _order_statistics(values, [math.floor(Fraction(repr(float(q))) * (count - 1)) for q in qs], group)


def global_mean(values: torch.Tensor, group: dist.ProcessGroup | None) -> float | None:
    """The sum over all ranks by the count over all ranks (not a mean of means), summed in float64. Not bit-exact under another
    partition: the order of the sum changes, by about 1e-16 relative to the mean magnitude."""
    count = _global_count(values, group)
    if not count:
        return None
    total = values.sum(dtype=torch.float64)
    _all_reduce(total, dist.ReduceOp.SUM, group)
    return total.item() / count


def global_max(values: torch.Tensor, group: dist.ProcessGroup | None) -> float | None:
    """The largest value over all ranks, bit-exact; 0.0 for -0.0."""
    if not _global_count(values, group):
        return None
    largest = values.max() if values.numel() else values.new_tensor(-math.inf)
    _all_reduce(largest, dist.ReduceOp.MAX, group)
    return largest.item() + 0.0  # -0.0 becomes 0.0: which of the two a maximum returns depends on the order


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)


def _global_count(values: torch.Tensor, group: dist.ProcessGroup | None) -> int:
    """The number of values over all ranks, after the check that all are finite."""
    if values.dim() != 1 or values.dtype != torch.float32:
        raise ValueError(f"values are {tuple(values.shape)} {values.dtype}, expected [n_local] torch.float32; flatten or cast them")
    local_not_finite = (~values.isfinite()).sum()
    counts = torch.stack([local_not_finite.new_tensor(values.numel()), local_not_finite])  # [2] int64
    _all_reduce(counts, dist.ReduceOp.SUM, group)
    count, not_finite = counts.tolist()
    if not_finite:
        raise ValueError(f"{not_finite} of {count} values over all ranks are NaN or infinite ({int(local_not_finite)} on this rank); "
                         "find where they come from, or mask them and count them before")  # fmt: skip
    return count


def _sortable_keys(values: torch.Tensor) -> torch.Tensor:
    """`[n]` float32 -> `[n]` int64 within 32 signed bits, in the same order. -0.0 becomes 0.0: equal values get equal keys."""
    bits = (values + 0.0).view(torch.int32)
    # Floats are sign and magnitude: below zero a larger magnitude is a smaller value, so all bits but the sign turn round.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)


def _values_of_keys(keys: torch.Tensor) -> list[float]:
    """The inverse of `_sortable_keys`, `[n]` int64 -> n floats."""
    bits = keys.to(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32).tolist()


def _order_statistics(values: torch.Tensor, ranks: Sequence[int], group: dist.ProcessGroup | None) -> tuple[float, ...]:
    """The values at the 0-based `ranks` of the global ascending order, Q of them, in 32 / BITS_PER_ROUND all-reduces of `[Q, 256]`."""
    keys = _sortable_keys(values).sort().values  # [n_local] int64
    wanted = torch.tensor(ranks, dtype=torch.int64, device=keys.device)[:, None]  # [Q, 1]
    low = torch.full_like(wanted, LOWEST_KEY)  # [Q, 1]: each answer lies in [low, low + 256 * width)
    bins = torch.arange(2**BITS_PER_ROUND, dtype=torch.int64, device=keys.device)[None]  # [1, 256]
    for shift in range(32 - BITS_PER_ROUND, -1, -BITS_PER_ROUND):
        width = 2**shift
        last_keys = low + (bins + 1) * width - 1  # [Q, 256]: the last key of each bin
        up_to = torch.searchsorted(keys, last_keys, right=True)  # [Q, 256]: how many of this rank's keys are not above it
        _all_reduce(up_to, dist.ReduceOp.SUM, group)
        low = low + (up_to <= wanted).sum(dim=1, keepdim=True) * width  # past all bins that end before the wanted rank
    return tuple(_values_of_keys(low.squeeze(1)))
