"""Run on 4 ranks: every case on groups of 1, 2 and 4 of them, the number of collectives, and errors that must reach all ranks."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist
from vocab_cases import CASES, check, small_blocks

from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, log_prob_and_entropy


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.set_num_threads(1)
    rank = dist.get_rank()
    worst = 0.0
    for size in (1, 2, 4):
        group, _ = dist.new_subgroups(group_size=size)
        worst = max([worst, *(check(case, group) for case in CASES)])
    count_collectives(dist.group.WORLD)
    one_rank_at_fault(rank, dist.group.WORLD)
    dist.barrier()
    if rank == 0:
        print(f"worst scaled fp32 error {worst:.2e}")
    dist.destroy_process_group()


def count_collectives(group: dist.ProcessGroup) -> None:
    """Two all-reduces forward and one backward, however many chunks."""
    small_blocks(tokens=3, columns=2)
    shapes: list[tuple[int, ...]] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        shapes.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        targets = torch.zeros(20, dtype=torch.int64)
        log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, group, 15)
        assert shapes == [(24,), (3, 20)], shapes
        (log_prob + entropy).sum().backward()
        assert shapes[2:] == [(20, 8)], shapes
        shapes.clear()
        log_prob, entropy = log_prob_and_entropy(torch.randn(20, 4, requires_grad=True), targets, group, 15)
        (log_prob + entropy).sum().backward()
        assert shapes == [(24,), (3, 20)], shapes
    finally:
        dist.all_reduce = original


def one_rank_at_fault(rank: int, group: dist.ProcessGroup) -> None:
    """What is wrong on rank 2 alone raises on every rank, and the group works afterwards."""
    targets = torch.zeros(3, dtype=torch.int64)
    targets[1] = 15 if rank == 2 else 14
    columns = 5 if rank == 2 else 4
    expect_error("1 target(s) lie outside", lambda: log_prob_and_entropy(torch.randn(3, 4), targets, group, 15))
    expect_error("differ in size: 4 to 5", lambda: log_prob_and_entropy(torch.randn(3, columns), targets, group, 15))
    expect_error("vocab_size is 17", lambda: linear_log_prob_and_entropy(torch.randn(3, 2), torch.randn(4, 2), targets, group, 17))
    log_prob_and_entropy(torch.randn(3, 4), targets.clamp(max=14), group, 15)


def expect_error(text: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError as error:
        assert text in str(error), error
        return
    raise AssertionError(f"no error with {text!r}")


if __name__ == "__main__":
    main()
