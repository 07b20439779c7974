"""What grading takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_antisd.records import CodeTests

# What became of an answer. Only GRADED was compared with anything; the others score what was reached by then, 0 in most cases.
GRADED, NO_PROGRAM, OUT_OF_TIME, TIMEOUT, CRASH = "graded", "no_program", "out_of_time", "timeout", "crash"


class GradingError(RuntimeError):
    """Grading cannot go on: the function cannot be loaded, breaks its contract, or fails on everything; tests are broken."""


class GradingPoolDied(GradingError):
    """The workers die, whatever they are given; nothing is wrong with the function or the answers. `GradingPool.rebuild` may help."""


@dataclass(frozen=True, kw_only=True)
class GradingTask:
    """One answer to grade. `tests` of a programming task decide instead of `answer`."""

    response: str
    answer: str
    tests: CodeTests | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the grader says of one answer."""

    reward: float
    feedback: str | None = None
    """What the teacher is told of this answer; None takes privileged.correct or privileged.incorrect."""
    outcome: str = GRADED
    """`graded`; `no_program`: no block of code in the response; `out_of_time`: the program's own time ran out, tests passed before count;
    `timeout`, `crash`: the worker was killed or died, or the function raised."""


@dataclass(frozen=True, kw_only=True)
class GradingReport:
    """What `GradingPool.grade_many` found. Example: `GradingReport(verdicts=(Verdict(reward=1.0),), timeouts=0, crashes=0)`."""

    verdicts: tuple[Verdict, ...]
    """In the order of the tasks; a reward of 0.0 for each answer counted below."""
    timeouts: int
    """Answers whose worker was killed when its time was up."""
    crashes: int
    """Answers whose worker died, or on which the function raised."""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(verdict.reward for verdict in self.verdicts)

    def count(self, outcome: str) -> int:
        """Answers with this `Verdict.outcome`."""
        return sum(verdict.outcome == outcome for verdict in self.verdicts)
