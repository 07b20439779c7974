"""Grading while others are still generated: the same verdicts as afterwards, in whatever order and by whatever polls they come."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading import GradingError, GradingPool, GradingTask
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


def test_verdicts_come_to_their_rollouts_in_any_order() -> None:
    groups = make_groups(30)
    todo = [(index, rollout.response_ids) for index, rollout in enumerate(r for group in groups for r in group.rollouts)]
    random.Random(0).shuffle(todo)
    with GradingPool(workers=2, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        while todo:
            grading(todo[:7])
            todo = todo[7:]
            grading([])
            time.sleep(0.002)
        graded = grading.complete(groups, FEEDBACK)
        assert [r.reward for g in graded.groups for r in g.rollouts] == [float((i + j) % 2 == 0) for i in range(30) for j in range(4)]
        assert {r.feedback for g in graded.groups for r in g.rollouts} == {FEEDBACK.correct, FEEDBACK.incorrect}
        assert graded.hidden_seconds > 0 and graded.timeouts == graded.crashes == 0
        EarlyGrading(pool, [], 4, str).complete([], FEEDBACK)  # the pool is free for the next


SLOW_GRADER = """
import time

def grade(response, answer):
    time.sleep(2.0)
    return 1.0
"""


def test_a_poll_does_not_wait_for_a_busy_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_grader.py").write_text(SLOW_GRADER)
    monkeypatch.syspath_prepend(str(tmp_path))
    groups = make_groups(1, 1)
    with GradingPool(workers=1, timeout_seconds=10.0, function="slow_grader:grade") as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 1, lambda ids: text(*ids))
        began = time.perf_counter()
        grading([(0, (0, 0))])
        longest = 0.0
        for _ in range(50):
            started = time.perf_counter()
            grading([])
            longest = max(longest, time.perf_counter() - started)
            time.sleep(0.01)
        assert longest < 0.2 and time.perf_counter() - began < 1.9, "the polls were over before the worker was"
        assert grading.complete(groups, FEEDBACK).groups[0].rollouts[0].reward == 1.0
        assert time.perf_counter() - began >= 2.0


def test_polls_alone_grade_everything() -> None:
    groups = make_groups(4)
    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        grading([(index, rollout.response_ids) for index, rollout in enumerate(r for group in groups for r in group.rollouts)])
        polls = 0
        while grading._grading._call.open and polls < 1000:
            grading([])
            polls += 1
            time.sleep(0.005)
        assert not grading._grading._call.open, "all were graded by polls alone"
        grading.complete(groups, FEEDBACK)


@pytest.mark.parametrize("reported", [[0, 1, 2], [0, 1, 2, 3, 3]])
def test_a_rollout_left_out_or_reported_twice_is_an_error(reported: list[int]) -> None:
    groups = make_groups(1)
    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 4, lambda ids: text(*ids))
        grading([(index, (0, index)) for index in reported])
        with pytest.raises(RuntimeError, match="must report each one once"):
            grading.complete(groups, FEEDBACK)


def test_a_pool_that_is_closed_says_so() -> None:
    pool = GradingPool(workers=1, timeout_seconds=10.0)
    pool.close()
    for _ in range(2):
        with pytest.raises(GradingError, match="closed"):
            EarlyGrading(pool, [], 4, str)


def test_a_generation_that_fails_leaves_the_pool_free() -> None:
    groups = make_groups(2)
    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        early = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        with pytest.raises(ValueError, match="the engine failed"), early as grading:
            grading([(0, (0, 0)), (1, (0, 1))])
            raise ValueError("the engine failed")
        assert pool.grade_many([GradingTask(response="\\boxed{1}", answer="1")]).rewards == (1.0,)
