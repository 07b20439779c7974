"""Values that are hard on a median of fp32 numbers, and random ways to deal them out to ranks."""

from __future__ import annotations

import torch

SMALLEST, LARGEST = 2.0**-149, float(torch.finfo(torch.float32).max)


def bitwise(value: float) -> bytes:
    """The bits of an fp32 number; -0.0 and 0.0 differ."""
    return torch.tensor(value, dtype=torch.float32).numpy().tobytes()


def expected(values: torch.Tensor) -> float:
    """torch's lower median of everything; -0.0, which it may return for 0.0, as 0.0."""
    return float(values.median()) or 0.0


def hard_values() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(999, generator=generator)
    nearby = torch.arange(500, dtype=torch.int32) + int(torch.tensor(0.7).view(torch.int32))
    cases = {
        "one": torch.tensor([3.5]), "two": torch.tensor([2.0, -1.0]), "odd": normal, "even": torch.cat([normal, normal[:1] + 1]),
        "entropies": torch.empty(2000).exponential_(2.0, generator=generator), "all equal": torch.full((77,), 0.3),
        "ties": (normal * 2).round(), "half zero": torch.where(normal > 0, normal, 0.0), "negative": -normal.abs() - 1,
        "neighbours": nearby.view(torch.float32), "negative neighbours": -nearby.view(torch.float32),
        "both zeros": torch.tensor([-0.0, 0.0] * 5 + [-0.0]), "zero in the middle": torch.tensor([-1.0, -0.0, 0.0, 1.0, 2.0]),
        "denormals": SMALLEST * torch.arange(-50, 60), "smallest": torch.tensor([SMALLEST, -SMALLEST]),
        "largest": torch.tensor([LARGEST, -LARGEST, LARGEST]), "wide": normal * 10 ** (20 * torch.randn(999, generator=generator)).clamp(-37, 30),
    }
    for index in range(20):
        size = int(torch.randint(1, 300, (), generator=generator))
        cases[f"random bits {index}"] = _finite_bits(size, generator)
    return cases


def _finite_bits(size: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of any exponent and sign."""
    bits = torch.randint(-(1 << 31), 1 << 31, (4 * size + 64,), generator=generator).to(torch.int32).view(torch.float32)
    return bits[bits.isfinite()][:size]


def deal(values: torch.Tensor, ranks: int, seed: int) -> list[torch.Tensor]:
    """Random shares, as uneven as chance makes them: each rank weighs between nothing and everything."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(ranks, generator=generator) ** 4
    owner = torch.multinomial(weights + 1e-6, len(values), replacement=True, generator=generator)
    if seed % 3 == 0:  # and sometimes one rank has all of them
        owner = torch.full_like(owner, seed % ranks)
    return [values[owner == rank] for rank in range(ranks)]
