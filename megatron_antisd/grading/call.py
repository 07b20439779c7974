"""The book of one grading: its tasks, what has no verdict yet, and what failed."""

from __future__ import annotations

import logging
from collections import deque

from megatron_antisd.grading.verdict import CRASH, TIMEOUT, GradingError, GradingReport, GradingTask, Verdict

logger = logging.getLogger(__name__)


class Call:
    """The state of one grading."""

    def __init__(self) -> None:
        self.tasks: list[GradingTask] = []
        self.waiting: deque[int] = deque()
        self.open = 0
        """Tasks without a verdict yet."""
        self.verdicts: list[Verdict | None] = []
        self.timeouts = 0
        self.crashes = 0
        self.traces: list[str] = []

    def add(self, task: GradingTask) -> None:
        self.waiting.append(len(self.tasks))
        self.tasks.append(task)
        self.verdicts.append(None)
        self.open += 1

    def settle(self, index: int, verdict: Verdict) -> None:
        assert self.verdicts[index] is None, f"answer {index} was graded twice"
        self.verdicts[index] = verdict
        self.open -= 1

    def fail(self, index: int, *, timeout: bool = False, trace: str | None = None) -> None:
        self.settle(index, Verdict(reward=0.0, outcome=TIMEOUT if timeout else CRASH))
        if timeout:
            self.timeouts += 1
        else:
            self.crashes += 1
        if trace is not None:
            self.traces.append(trace)

    def report(self, function: str) -> GradingReport:
        if self.traces and len(self.traces) == len(self.tasks):
            raise GradingError(
                f"grading function {function!r} raised on every one of {len(self.tasks)} answers; the first:\n{self.traces[0]}"
            )
        if self.traces:
            logger.warning("grading function %r raised on %d of %d answers, which score 0; the first:\n%s",
                           function, len(self.traces), len(self.tasks), self.traces[0])  # fmt: skip
        return GradingReport(verdicts=tuple(self.verdicts), timeouts=self.timeouts, crashes=self.crashes)
