"""Grade groups of rollouts while the engine still decodes others: every rank its share, all results on every rank."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading.pool import GradingPool, GradingReport
from megatron_antisd.grading.verdict import CRASH, TIMEOUT, GradingError, GradingPoolDied, GradingTask, Verdict
from megatron_antisd.records import CORRECT_REWARD, Problem, Rollout, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class GradedGroups:
    groups: tuple[RolloutGroup, ...]
    timeouts: int
    """Answers of the whole batch that ran out of time and scored 0."""
    crashes: int
    """Answers of the whole batch whose grader died or raised, and scored 0."""
    rebuilds: int = 0
    """Times that a rank's grading pool was rebuilt, over all ranks, since the last grading."""
    hidden_seconds: float | None = None
    """From the first answer given to a grader of this rank until the engine was done: grading that the step did not wait for."""
    given_up: int = 0
    """Groups that the engine began and gave up (`tails.oversample`)."""
    rounds: int = 1
    """Rounds of generation (`tails.dynamic_sampling`)."""
    dropped: int = 0
    """Complete groups that left the batch since their rewards were all equal."""


class EarlyGrading:
    """Grades rollouts while the engine still decodes others. Generate inside of its `with` (a failure there frees the pool), with the object
    itself as `finished` of `generate_groups`; then call `complete`.

    `problems[i]` is the one of rollouts `i * group_size` and following; `decode` turns response ids into text. An engine that begins again reports
    rollouts again: those with the tokens they had are known already, others are graded too, and the verdict on the tokens that the engine returned
    in the end counts.
    """

    def __init__(self, pool: GradingPool, problems: Sequence[Problem], group_size: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._pool, self._grading = pool, pool.open()
        self._problems, self._group_size, self._decode = problems, group_size, decode
        self._kept: Sequence[int] = range(len(problems))
        self._tasks: list[GradingTask] = []
        self._places: dict[tuple[int, tuple[int, ...]], int] = {}
        """Of (rollout, response ids) among the tasks."""
        self._error: Exception | None = None
        self._started: float | None = None

    def __enter__(self) -> EarlyGrading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._grading.abandon()

    def __call__(self, finished: Sequence[tuple[int, Sequence[int]]]) -> None:
        """(index, response ids) of rollouts that are done; call it without any, too, so that the workers stay busy. Never raises: the other ranks
        are in the middle of a decoding step. `complete` raises instead."""
        try:
            new = [(index, tuple(ids)) for index, ids in finished if (index, tuple(ids)) not in self._places]
            for index, ids in new:
                task = task_of(self._decode(ids), self._problems[index // self._group_size])
                self._places[index, ids] = len(self._tasks)
                self._tasks.append(task)
                if self._error is None:
                    self._grading.add(task)
            if self._tasks and self._error is None:
                self._started = self._started or time.perf_counter()
                self._grading.poll()
        except Exception as error:  # whatever it was: see above
            self._error = self._error or error

    def keep(self, numbers: Sequence[int]) -> None:
        """The groups that came back, in order, by their number among the problems. Others were given up: nobody waits for their
        grading, and it counts nowhere."""
        self._kept = numbers

    def complete(self, groups: Sequence[RolloutGroup], feedback: PrivilegedConfig) -> GradedGroups:
        """Wait for what is not graded yet, then set reward and feedback of every rollout. Collective. A pool that died is rebuilt, and this
        rank's whole share graded again.

        Raises what went wrong since the beginning, on all ranks: GradingError, also for a pool that died more than `grading.max_rebuilds` times;
        RuntimeError where the engine did not report every rollout on one rank."""
        hidden = 0.0 if self._started is None else time.perf_counter() - self._started
        share, error = _Share(verdicts={}, rebuilds=0), None
        try:
            begun = [(number * self._group_size + rollout.index, rollout.response_ids)
                     for number, group in zip(self._kept, groups, strict=True) for rollout in group.rollouts]
            places = {index: self._places.get(rollout) for index, rollout in enumerate(begun)}
            wanted = sorted({place for place in places.values() if place is not None})
            verdicts = dict(zip(wanted, self._report(wanted).verdicts, strict=True))
            share = _Share(verdicts={index: verdicts[place] for index, place in places.items() if place is not None},
                           rebuilds=self._pool.take_rebuilds())
        except Exception as exception:  # the other ranks wait for this one's share
            error = exception
            self._grading.abandon()
        return replace(_graded(groups, _shares_of_all(share, error), feedback), hidden_seconds=hidden,
                       given_up=len(self._problems) - len(self._kept))

    def _report(self, wanted: Sequence[int]) -> GradingReport:
        """Of these tasks."""
        try:
            if self._error is not None:
                self._grading.abandon()
                raise self._error
            self._grading.keep(wanted)
            return self._grading.report()
        except GradingPoolDied as error:
            death = error
        self._pool.rebuild(death)
        return self._pool.grade_many([self._tasks[place] for place in wanted])


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one rank graded."""

    verdicts: dict[int, Verdict]
    """By rollout."""
    rebuilds: int


def task_of(response: str, problem: Problem) -> GradingTask:
    return GradingTask(response=response, answer=problem.answer, tests=problem.tests)


def _shares_of_all(mine: _Share, error: Exception | None) -> list[_Share]:
    """Raises GradingError with one text on all ranks where any of them has an error; without other ranks, the error itself."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return [mine]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine if error is None else _said(error))
    failed = {rank: share for rank, share in enumerate(shares) if isinstance(share, str)}
    if failed:
        raise GradingError("grading failed on " + "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())) from error
    return shares


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, GradingError) else f"{type(error).__name__}: {error}"


def _graded(groups: Sequence[RolloutGroup], shares: Sequence[_Share], feedback: PrivilegedConfig) -> GradedGroups:
    """All ranks' verdicts, laid on the groups."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if sorted(index for share in shares for index in share.verdicts) != list(range(len(rollouts))):
        graders = Counter(index for share in shares for index in share.verdicts)
        raise RuntimeError(f"of {len(rollouts)} rollouts {len(graders)} were given to a grader, {sum(n > 1 for n in graders.values())} of them on "
                           "several ranks; the engine must report each one on one rank, with the tokens that it returns")
    verdicts = {index: verdict for share in shares for index, verdict in share.verdicts.items()}
    graded = iter([_with_verdict(rollout, verdicts[index], feedback) for index, rollout in enumerate(rollouts)])
    return GradedGroups(
        groups=tuple(RolloutGroup(problem=group.problem, rollouts=tuple(next(graded) for _ in group.rollouts)) for group in groups),
        timeouts=sum(verdict.outcome == TIMEOUT for verdict in verdicts.values()),
        crashes=sum(verdict.outcome == CRASH for verdict in verdicts.values()), rebuilds=sum(share.rebuilds for share in shares))


def _with_verdict(rollout: Rollout, verdict: Verdict, feedback: PrivilegedConfig) -> Rollout:
    return rollout.graded(verdict.reward, feedback_of(verdict, feedback))


def feedback_of(verdict: Verdict, usual: PrivilegedConfig) -> str:
    """What the teacher is told: the grader's own words, or the usual ones."""
    if verdict.feedback is not None:
        return verdict.feedback
    return usual.correct if verdict.reward >= CORRECT_REWARD else usual.incorrect
