"""Run with TRITON_INTERPRET=1: both kernels on shapes with borders of every kind; prints the largest relative error."""

from __future__ import annotations

import math

import torch

from megatron_antisd.parallel.vocab_kernels import TORCH
from megatron_antisd.parallel.vocab_triton import TRITON

SHAPES = [(1, 1), (3, 7), (5, 2048), (4, 2049), (2, 5000)]


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def compare(rows: int, columns: int, scale: float) -> float:
    generator = torch.Generator().manual_seed(rows * columns)
    wide = scale * torch.randn(rows, columns + 3, generator=generator)  # rows lie apart, as a block of a chunk's do
    if columns > 4:
        wide[0, 1:3] = -math.inf
    if scale > 10:
        wide[-1, :columns] = -math.inf
    place, inside = torch.randint(0, columns, (rows,), generator=generator), torch.rand(rows, generator=generator) > 0.3
    ours, reference = wide.clone(), wide.clone()
    mine, theirs = (k.statistics(x[:, :columns], place, inside) for k, x in ((TRITON, ours), (TORCH, reference)))
    assert torch.equal(ours[:, columns:], wide[:, columns:]), "columns behind the block were touched"
    assert torch.equal(mine[[0, 3]], theirs[[0, 3]]), "maximum and target are no sums"
    worst = max(relative(mine[1:3], theirs[1:3]), relative(ours[:, :columns], reference[:, :columns]))
    factor, slope = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator) * inside
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        wanted = TORCH.gradient(reference[:, :columns].clone(), factor, place, slope, dtype)
        got = TRITON.gradient(ours[:, :columns], factor, place, slope, dtype)
        assert got.dtype == dtype and relative(got.float(), wanted.float()) < tolerance
    return worst


def not_a_number_stays() -> None:
    logits = torch.randn(2, 100)
    logits[0, 7] = math.nan
    place, inside = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    statistics = TRITON.statistics(logits, place, inside)
    assert statistics[1, 0].isnan() and statistics[:, 1].isfinite().all()


if __name__ == "__main__":
    not_a_number_stays()
    print(max(compare(rows, columns, scale) for rows, columns in SHAPES for scale in (1.0, 30.0)))
