"""`parallel.vocab_kernels` in Triton: each function passes over a block once or twice, where torch's operators pass several times.

One program a row, since a row is long and rows are many. The second pass of the statistics finds its row in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_antisd.parallel.vocab_kernels import EXP_FLOOR, Kernels

_TILE, _WARPS = 2048, 8
_FLOOR = tl.constexpr(EXP_FLOOR)


@triton.jit
def _statistics_kernel(logits, place, inside, out, stride, columns, rows, TILE: tl.constexpr):  # noqa: ANN001, ANN202, N803 (Triton's types)
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    offsets = tl.arange(0, TILE)
    here = tl.load(inside + row)
    at_target = tl.load(line + tl.load(place + row))  # before the logits are overwritten
    highest = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, columns, TILE):
        x = tl.load(line + start + offsets, mask=start + offsets < columns, other=float("-inf"))
        highest = tl.maximum(highest, x)
    peak = tl.max(highest, axis=0)
    subtracted = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE], tl.float32)
    for start in range(0, columns, TILE):
        mask = start + offsets < columns
        x = tl.load(line + start + offsets, mask=mask, other=float("-inf")) - subtracted
        x = tl.where(x < _FLOOR, _FLOOR, x)  # not a maximum: a NaN must stay one
        e = tl.where(mask, tl.exp(x), 0.0)
        tl.store(line + start + offsets, e, mask=mask)
        total += e
        weighted += x * e
    tl.store(out + row, peak)
    tl.store(out + rows + row, tl.sum(total, axis=0))
    tl.store(out + 2 * rows + row, tl.sum(weighted, axis=0))
    tl.store(out + 3 * rows + row, tl.where(here, at_target, 0.0))


@triton.jit
def _gradient_kernel(exponential, scale, place, slope, out, stride, columns, TILE: tl.constexpr):  # noqa: ANN001, ANN202, N803 (Triton's types)
    row, tile = tl.program_id(0), tl.program_id(1)
    offsets = tile * TILE + tl.arange(0, TILE)
    mask = offsets < columns
    e = tl.load(exponential + row.to(tl.int64) * stride + offsets, mask=mask, other=0.0)
    gradient = e * tl.load(scale + row) + tl.where(offsets == tl.load(place + row), tl.load(slope + row), 0.0)
    tl.store(out + row.to(tl.int64) * columns + offsets, gradient.to(out.dtype.element_ty), mask=mask)


def _statistics(logits: torch.Tensor, place: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    rows, columns = logits.shape
    out = torch.empty(4, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _statistics_kernel[(rows,)](logits, place, inside, out, logits.stride(0), columns, rows, TILE=_TILE, num_warps=_WARPS)
    return out


def _gradient(exponential: torch.Tensor, scale: torch.Tensor, place: torch.Tensor, slope: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rows, columns = exponential.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, device=exponential.device)
    if rows:
        grid = (rows, triton.cdiv(columns, _TILE))
        _gradient_kernel[grid](exponential, scale, place, slope, out, exponential.stride(0), columns, TILE=_TILE, num_warps=_WARPS)
    return out


TRITON = Kernels(statistics=_statistics, gradient=_gradient)
