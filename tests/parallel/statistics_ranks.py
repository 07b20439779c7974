"""Run on 4 ranks: statistics of random partitions (ranks without values among them) against torch.sort of all values."""

from __future__ import annotations

import datetime
import math

import torch
import torch.distributed as dist

from megatron_antisd.parallel.statistics import global_lower_median, global_max, global_mean, global_quantiles

QUANTILES = (0.0, 0.05, 0.29, 0.5, 0.95, 1.0)


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(11)
    for number in range(36):
        count = int(torch.randint(0, 60, (), generator=generator)) if number % 5 else number // 5
        values = draw(number, count, generator)
        owner = torch.randint(0, world, (count,), generator=generator)
        if number % 4 == 0:
            owner[owner == number // 4 % world] = world - 1  # leaves a rank without values, as a rule
        check(values, values[owner == rank])
    not_finite(rank)
    many_values(rank, world)
    dist.barrier()
    if rank == 0:
        print("statistics agree")
    dist.destroy_process_group()


def draw(number: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`[count]` float32 of one of six kinds."""
    kinds = (
        lambda: torch.randn(count, generator=generator),
        lambda: torch.randn(count, generator=generator).round(),  # duplicates, both zeros
        lambda: -torch.rand(count, generator=generator) * 1e-40,  # denormal, negative
        lambda: torch.randn(count, generator=generator) * 3e38 / 8,  # near the largest
        lambda: torch.full((count,), 2.5),
        lambda: torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator).to(torch.int32).view(torch.float32),  # any bits
    )
    values = kinds[number % len(kinds)]()
    return torch.where(values.isfinite(), values, torch.tensor(-0.0))


def check(values: torch.Tensor, local: torch.Tensor) -> None:
    """Bitwise against the sorted whole; 0.0 stands for -0.0."""
    group = dist.group.WORLD
    results = (
        global_lower_median(local, group), global_quantiles(local, QUANTILES, group), global_max(local, group), global_mean(local, group),
    )  # fmt: skip
    everywhere: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, results)
    assert all(other == results for other in everywhere), everywhere
    if values.numel() == 0:
        assert results == (None,) * 4, results
        return
    ordered, last = values.sort().values, values.numel() - 1
    assert results[0] == ordered[last // 2].item()
    assert results[0] == values.median().item()  # torch takes the lower middle as well
    assert results[1] == tuple(ordered[q100 * last // 100].item() for q100 in (0, 5, 29, 50, 95, 100))
    assert all(math.copysign(1.0, value) == 1.0 for value in results[1] if value == 0.0), "-0.0 came back"
    assert results[2] == ordered[-1].item()
    magnitude = values.double().abs().mean().item()
    assert abs(results[3] - values.double().mean().item()) <= 1e-14 * magnitude


def not_finite(rank: int) -> None:
    """NaN or infinity on rank 1 alone raises on all ranks, and the group works afterwards."""
    for bad in (math.nan, math.inf, -math.inf):
        for statistic in (global_lower_median, global_max, global_mean, lambda v, g: global_quantiles(v, [0.5], g)):
            try:
                statistic(torch.tensor([1.0, bad] if rank == 1 else [1.0]), dist.group.WORLD)
            except ValueError as error:
                assert "1 of 5 values over all ranks" in str(error), error
            else:
                raise AssertionError(f"{bad} raised nothing on rank {rank}")
    assert global_max(torch.tensor([float(rank)]), dist.group.WORLD) == 3.0


def many_values(rank: int, world: int) -> None:
    values = torch.randn(200_001, generator=torch.Generator().manual_seed(1))
    check(values, values.chunk(world)[rank])


if __name__ == "__main__":
    main()
