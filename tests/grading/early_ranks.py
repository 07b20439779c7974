"""Early grading on two ranks, and what its tests share: groups whose verdicts are known, and graders that are killed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch.distributed as dist

from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading import GradingError, GradingPool
from megatron_antisd.grading.groups import EarlyGrading
from megatron_antisd.records import Problem, Rollout, RolloutGroup

FEEDBACK = PrivilegedConfig()


def make_groups(count: int, size: int = 4) -> list[RolloutGroup]:
    """Of problem i the rollouts j with (i + j) even are right."""
    groups = []
    for i in range(count):
        problem = Problem(id=f"p{i}", prompt="?", answer=str(i))
        rollouts = tuple(Rollout(problem_id=problem.id, index=j, prompt_ids=(1,), response_ids=(i, j), engine_log_probs=(-1.0, -1.0),
                                 truncated=False, policy_version=0, text=text(i, j)) for j in range(size))
        groups.append(RolloutGroup(problem=problem, rollouts=rollouts))
    return groups


def text(i: int, j: int) -> str:
    return f"\\boxed{{{i if (i + j) % 2 == 0 else 'x'}}}"


@contextlib.contextmanager
def killed_at_every_start(pool: GradingPool) -> Iterator[None]:
    """Kills every worker, and each that takes a dead one's place, as the kernel does where memory is short."""

    def kill() -> None:
        for worker in pool._workers:
            worker.process.kill()
            worker.process.wait()

    replace = pool._replace

    def replace_and_kill(slot: int, lost: str | None) -> int:
        code = replace(slot, lost)
        kill()
        return code

    pool._replace = replace_and_kill  # type: ignore[method-assign]
    kill()
    try:
        yield
    finally:
        del pool._replace


def main() -> None:
    """Each rank reports every other rollout. Rank 1's pool dies: rebuilt, counted on both; the next time it may not be."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    groups = make_groups(4)
    mine = [(i, r.response_ids) for i, r in enumerate(r for g in groups for r in g.rollouts)][rank::2]
    expected = [float((i + j) % 2 == 0) for i in range(4) for j in range(4)]
    with GradingPool(workers=1, timeout_seconds=10.0, max_rebuilds=1) as pool:
        for death in (False, True):
            grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
            grading(mine)
            if death and rank == 1:
                die(pool, grading)
            graded = grading.complete(groups, FEEDBACK)
            assert [r.reward for g in graded.groups for r in g.rollouts] == expected
            assert graded.rebuilds == int(death), graded.rebuilds
        grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        grading(mine)
        if rank == 1:
            die(pool, grading)
        try:
            grading.complete(groups, FEEDBACK)
        except GradingError as error:
            message = str(error)
        assert message.startswith("grading failed on rank 1: the grading pool died 2 times in this process, and grading.max_rebuilds=1"), message
    dist.barrier()
    sys.stdout.write(f"rank {rank}: as it should be\n")
    dist.destroy_process_group()


def die(pool: GradingPool, grading: EarlyGrading) -> None:
    with killed_at_every_start(pool):
        while grading._error is None:
            grading([])


if __name__ == "__main__":
    main()
