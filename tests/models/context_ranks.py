"""Ranks of the context-parallel attention test: every case against the whole row on one rank, in float64. Usage: context_ranks.py"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_antisd.compat import megatron_cpu

if TYPE_CHECKING:
    from megatron_antisd.models.attention import PackedAttention, PackedRotary, PackedSequences

VALUE, GRADIENT = 1e-12, 1e-11


def cases(size: int) -> list[tuple[list[int], list[int | None] | None]]:
    """Lengths that fill rows of a multiple of twice the ranks: one long sequence, many short ones, borders inside trunks and inside tails."""
    found: list[tuple[list[int], list[int | None] | None]] = [([96], None), ([7, 1, 30, 2, 56], None), ([1] * 48, None), ([40, 2, 3, 51], None)]
    found += [([48, 8, 40], [None, 0, 0]), ([9, 2, 7, 9, 4, 30, 1, 1, 33], [None, 0, 0, None, 3, None, 5, None, 0])]
    assert all(sum(lengths) % (2 * size) == 0 for lengths, _ in found)
    return found


def run(layer: PackedAttention, rotary: PackedRotary, inputs: list[torch.Tensor], packed: PackedSequences,
        weight: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Output, and the gradients of its product with `weight`."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    rotary(packed)
    out = layer(*inputs, packed_seq_params=packed)
    return out.detach(), torch.autograd.grad((out * weight).sum(), inputs)


def main() -> None:
    dist.init_process_group("gloo")
    megatron_cpu.install()
    from models.test_attention import DIM, GROUPS, HEADS, build, draw

    from megatron_antisd.models.attention import PackedRotary, PackedSequences, context_part
    from megatron_antisd.models.rotary import FULL, SLIDING

    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    angles = 1e4 ** -(torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)
    rotary = PackedRotary({FULL: (angles, 1.0), SLIDING: (angles / 3, 1.5)}, torch.float64)
    compared = 0
    for window in (None, 5, 16):
        layer = build(window)
        for lengths, continues in cases(size):
            total = sum(lengths)
            held = context_part(total, rank, size)
            whole = [draw(total, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
            direction = torch.randn(total, 1, HEADS * DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

            expected, gradients = run(layer, rotary, whole, PackedSequences.of(lengths, continues=continues), direction)
            shared = PackedSequences.of(lengths, continues=continues, context=group)
            mine, parts = run(layer, rotary, [tensor[held] for tensor in whole], shared, direction[held])
            assert (mine - expected[held]).abs().max() < VALUE, (window, lengths)
            for gradient, part in zip(gradients, parts, strict=True):
                assert (part - gradient[held]).abs().max() < GRADIENT, (window, lengths)
            compared += 1
    if rank == 0:
        print(f"compared {compared}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
