"""Checksums of boxes that add up: the sum over boxes that make up a tensor is that of the tensor, whoever holds them.

Each element's bits are multiplied by a number that its place in the whole tensor decides, and added modulo 2^64. So values that change places,
rows of another tensor, one flipped bit or an old value show; by chance two contents agree once in about 2^63.
"""

from __future__ import annotations

import torch

from megatron_antisd.wire.boxes import Box

MODULUS = 1 << 64
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Elements summed at once: a chunk's intermediate values take about 40 bytes an element. On CPU they stay in the cache."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def box_checksum(values: torch.Tensor, box: Box, columns: int) -> int:
    """0 .. 2^64 - 1. `values` [rows, columns of the box] (or a vector) are `box` of a tensor with `columns` columns in all."""
    matrix = values.reshape(box.rows, box.columns)
    bits = matrix.contiguous().view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    step = max(1, CHUNK[values.device.type] // max(1, box.columns))
    across = torch.arange(box.left, box.right, device=values.device)
    for first in range(0, box.rows, step):
        part = bits[first : first + step]
        down = torch.arange(box.top + first, box.top + first + part.shape[0], device=values.device)
        total += (part.long() * _multipliers(down[:, None] * columns + across)).sum()
    return int(total) % MODULUS


def _multipliers(index: torch.Tensor) -> torch.Tensor:
    """int64 -> int64, odd, without any pattern over neighbouring indices; overflow wraps."""
    mixed = (index + 1) * -7046029254386353131  # 2^64 / golden ratio
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 32)) * -7723592293110705685
    return (mixed ^ (mixed >> 30)) | 1


def add(*checksums: int) -> int:
    """Of boxes that do not overlap, the checksum of all together."""
    return sum(checksums) % MODULUS
