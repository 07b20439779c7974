"""Grade groups of rollouts while the engine still decodes others: every rank its share, all results on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import torch.distributed as dist

from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading.pool import GradingPool, GradingReport
from megatron_antisd.grading.verdict import GradingTask, Verdict
from megatron_antisd.records import CORRECT_REWARD, Problem, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class GradedGroups:
    groups: tuple[RolloutGroup, ...]
    timeouts: int
    """Answers of the whole batch that ran out of time and scored 0."""
    crashes: int
    """Answers of the whole batch whose grader died or raised, and scored 0."""
    hidden_seconds: float | None = None
    """From the first answer given to a grader of this rank until the engine was done: grading that the step did not wait for."""


class EarlyGrading:
    """Grades rollouts while the engine still decodes others. Generate inside of its `with` (a failure there frees the pool), with the object
    itself as `finished` of `generate_groups`; then call `complete`.

    `problems[i]` is the one of rollouts `i * group_size` and following; `decode` turns response ids into text.
    """

    def __init__(self, pool: GradingPool, problems: Sequence[Problem], group_size: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._grading, self._problems, self._group_size, self._decode = pool.open(), problems, group_size, decode
        self._indices: list[int] = []
        self._started: float | None = None

    def __enter__(self) -> EarlyGrading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._grading.abandon()

    def __call__(self, finished: Sequence[tuple[int, Sequence[int]]]) -> None:
        """(index, response ids) of rollouts that are done; call it without any, too, so that the workers stay busy."""
        for index, response_ids in finished:
            self._indices.append(index)
            self._grading.add(task_of(self._decode(response_ids), self._problems[index // self._group_size]))
        if self._indices:
            self._started = self._started or time.perf_counter()
            self._grading.poll()

    def complete(self, groups: Sequence[RolloutGroup], feedback: PrivilegedConfig) -> GradedGroups:
        """Wait for what is not graded yet, then set reward and feedback of every rollout. Collective.

        Raises RuntimeError where the engine did not report every rollout once."""
        hidden = 0.0 if self._started is None else time.perf_counter() - self._started
        return replace(_gathered(groups, self._indices, self._grading.report(), feedback), hidden_seconds=hidden)


def task_of(response: str, problem: Problem) -> GradingTask:
    return GradingTask(response=response, answer=problem.answer, tests=problem.tests)


def _gathered(groups: Sequence[RolloutGroup], indices: Sequence[int], mine: GradingReport, feedback: PrivilegedConfig) -> GradedGroups:
    """All ranks' verdicts, each rank's for the rollouts `indices`, laid on the groups."""
    parts = [(list(indices), mine)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()  # type: ignore[list-item]
        dist.all_gather_object(parts, (list(indices), mine))
    verdicts = {index: verdict for where, report in parts for index, verdict in zip(where, report.verdicts, strict=True)}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if sorted(index for where, _ in parts for index in where) != list(range(len(rollouts))):
        raise RuntimeError(f"of {len(rollouts)} rollouts {len(verdicts)} were given to the grader, {sum(len(where) for where, _ in parts)} times; "
                           "the engine must report each one once")
    graded = iter([_with_verdict(rollout, verdicts[index], feedback) for index, rollout in enumerate(rollouts)])
    return GradedGroups(
        groups=tuple(RolloutGroup(problem=group.problem, rollouts=tuple(next(graded) for _ in group.rollouts)) for group in groups),
        timeouts=sum(report.timeouts for _, report in parts), crashes=sum(report.crashes for _, report in parts))


def _with_verdict(rollout: Rollout, verdict: Verdict, feedback: PrivilegedConfig) -> Rollout:
    return rollout.graded(verdict.reward, feedback_of(verdict, feedback))


def feedback_of(verdict: Verdict, usual: PrivilegedConfig) -> str:
    """What the teacher is told: the grader's own words, or the usual ones."""
    if verdict.feedback is not None:
        return verdict.feedback
    return usual.correct if verdict.reward >= CORRECT_REWARD else usual.incorrect
