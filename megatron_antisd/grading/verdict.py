"""What grading takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_antisd.records import CodeTests


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
