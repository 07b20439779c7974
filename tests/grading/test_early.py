"""Grading while others are still generated: the same verdicts as afterwards, in whatever order and by whatever polls they come."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from distributed import run_ranks
from grading.early_ranks import FEEDBACK, killed_at_every_start, make_groups, text

from megatron_antisd.grading import GradingError, GradingPool, GradingTask
from megatron_antisd.grading.groups import EarlyGrading


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


@pytest.mark.parametrize("reported", [[(0, 0), (0, 1), (0, 2)], [(0, 0), (0, 1), (0, 2), (0, 9)]])
def test_a_rollout_left_out_or_with_other_tokens_is_an_error(reported: list[tuple[int, int]]) -> None:
    groups = make_groups(1)
    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 4, lambda ids: text(*ids))
        grading(list(enumerate(reported)))
        with pytest.raises(RuntimeError, match="of 4 rollouts 3 were given to a grader.*must report each one on one rank"):
            grading.complete(groups, FEEDBACK)
        assert pool.grade_many([]).rewards == (), "the pool is free"


def test_a_generation_that_begins_again_is_graded_once() -> None:
    """The first time two of four are reported, one of them with tokens that the second time are others (of another text, and another reward)."""
    groups = make_groups(1)
    rollouts = list(enumerate(rollout.response_ids for rollout in groups[0].rollouts))
    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 4, lambda ids: text(*ids))
        grading([rollouts[0], (1, (0, 2))])  # that one would be right
        for one in rollouts:
            grading([one])
        grading(rollouts)
        assert len(grading._tasks) == 5, "what is known is not graded again"
        graded = grading.complete(groups, FEEDBACK)
    assert [r.reward for r in graded.groups[0].rollouts] == [1.0, 0.0, 1.0, 0.0]
    assert graded.rebuilds == graded.crashes == 0


def test_only_what_counts_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-out and a crash of responses that the engine did not return in the end are nobody's."""
    (tmp_path / "fragile_grader.py").write_text(
        "import os, time\n\ndef grade(response, answer):\n    if response == '-1':\n        os._exit(1)\n"
        "    if response == '-2':\n        time.sleep(60)\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    groups = make_groups(1)
    with GradingPool(workers=1, timeout_seconds=1.0, function="fragile_grader:grade") as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 4, lambda ids: str(ids[0]))
        grading([(0, (-1,)), (1, (-2,))])
        grading(list(enumerate(rollout.response_ids for rollout in groups[0].rollouts)))
        graded = grading.complete(groups, FEEDBACK)
    assert [r.reward for r in graded.groups[0].rollouts] == [1.0] * 4
    assert (graded.timeouts, graded.crashes) == (0, 0)


def test_an_error_is_raised_after_the_generation() -> None:
    groups = make_groups(1)

    def decode(ids: Sequence[int]) -> str:
        raise KeyError("no such token")

    with GradingPool(workers=1, timeout_seconds=10.0) as pool:
        grading = EarlyGrading(pool, [groups[0].problem], 4, decode)
        for _ in range(2):
            grading([(0, (0, 0))])
        with pytest.raises(KeyError, match="no such token"):
            grading.complete(groups, FEEDBACK)
        assert pool.grade_many([]).rewards == (), "the pool is free"


def test_a_pool_that_died_meanwhile_is_rebuilt(caplog: pytest.LogCaptureFixture) -> None:
    groups = make_groups(3)
    rollouts = list(enumerate(rollout.response_ids for group in groups for rollout in group.rollouts))
    with GradingPool(workers=1, timeout_seconds=10.0, max_rebuilds=1) as pool:
        grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        grading(rollouts[:6])
        with killed_at_every_start(pool):
            while grading._error is None:
                grading([])
        grading(rollouts[6:])
        graded = grading.complete(groups, FEEDBACK)
        assert [r.reward for g in graded.groups for r in g.rollouts] == [float((i + j) % 2 == 0) for i in range(3) for j in range(4)]
        assert graded.rebuilds == 1 and graded.crashes == 0 and "rebuilding the grading pool (1 of at most 1 times)" in caplog.text
        grading = EarlyGrading(pool, [group.problem for group in groups], 4, lambda ids: text(*ids))
        grading(rollouts)
        assert grading.complete(groups, FEEDBACK).rebuilds == 0


def test_on_several_ranks_an_error_of_one_is_raised_on_all() -> None:
    output = run_ranks(Path(__file__).with_name("early_ranks.py"), 2, timeout=120)
    assert sorted(output.split("\n"))[-2:] == [f"rank {rank}: as it should be" for rank in (0, 1)], output


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


def test_groups_that_were_given_up_count_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups 0 and 2 of four do not come back: one response of theirs was reported and would be graded for a minute, another crashes."""
    (tmp_path / "picky_grader.py").write_text(
        "import time\n\ndef grade(response, answer):\n    if answer == '0':\n        time.sleep(60)\n    if answer == '2':\n        raise OSError\n"
        "    return float(answer)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    groups = make_groups(4, 2)
    with GradingPool(workers=1, timeout_seconds=50.0, function="picky_grader:grade") as pool:
        grading = EarlyGrading(pool, [group.problem for group in groups], 2, lambda ids: text(*ids))
        began = time.perf_counter()
        grading([(0, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (2, 0)), (6, (3, 0)), (7, (3, 1))])
        grading.keep([1, 3])
        graded = grading.complete([groups[1], groups[3]], FEEDBACK)
        assert time.perf_counter() - began < 40, "the minute was not waited for"
    assert [[r.reward for r in group.rollouts] for group in graded.groups] == [[1.0, 1.0], [3.0, 3.0]]
    assert graded.timeouts == graded.crashes == 0 and graded.given_up == 2
