"""Run on 4 ranks: the lower median on groups of 1, 2 and 4 of them, dealt out in many ways; errors that must reach all ranks; what is sent."""

from __future__ import annotations

import datetime
import math

import torch
import torch.distributed as dist
from statistics_cases import bitwise, deal, expected, hard_values

from megatron_antisd.parallel.statistics import lower_median

DEALS = 6


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    cases, checked = hard_values(), 0
    for size in (1, 2, 4):
        group, _ = dist.new_subgroups(group_size=size)
        for name, values in cases.items():
            for seed in range(DEALS):
                mine = deal(values, size, seed)[dist.get_rank(group)]
                found = lower_median(mine, group)
                assert bitwise(found) == bitwise(expected(values)), (size, name, seed, found, expected(values))
                checked += 1
        assert lower_median(torch.empty(0), group) is None
    one_rank_at_fault(dist.group.WORLD)
    sent_is_small(dist.group.WORLD)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{checked} medians are torch's")
    dist.destroy_process_group()


def one_rank_at_fault(group: dist.ProcessGroup) -> None:
    """What is not finite shows on every rank, and the next call works."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        values = torch.tensor([1.0, bad if dist.get_rank() == 2 else 2.0])
        assert math.isnan(lower_median(values, group)), f"{bad} on one rank was accepted on rank {dist.get_rank()}"
    assert lower_median(torch.tensor([float(dist.get_rank())]), group) == 1.0


def sent_is_small(group: dist.ProcessGroup) -> None:
    """Three all-reduces of counts, whatever the number of values."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for size in (3, 100_000):
            lower_median(torch.rand(size), group)
    finally:
        dist.all_reduce = original
    assert sizes == [8 * 2049, 8 * 2048, 8 * 1024] * 2, sizes


if __name__ == "__main__":
    main()
