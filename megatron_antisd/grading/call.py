"""The book of one grading: its tasks, what has no verdict yet, and what failed."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection

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
        self.dropped: set[int] = set()
        self.traces: dict[int, str] = {}

    def add(self, task: GradingTask) -> None:
        self.waiting.append(len(self.tasks))
        self.tasks.append(task)
        self.verdicts.append(None)
        self.open += 1

    def keep(self, indices: Collection[int]) -> None:
        """All other tasks are dropped: nobody waits for them, and they count nowhere."""
        self.dropped |= set(range(len(self.tasks))) - set(indices)
        self.waiting = deque(index for index in self.waiting if index not in self.dropped)
        self.open = sum(verdict is None and index not in self.dropped for index, verdict in enumerate(self.verdicts))

    def settle(self, index: int, verdict: Verdict) -> None:
        assert self.verdicts[index] is None, f"answer {index} was graded twice"
        self.verdicts[index] = verdict
        self.open -= 1

    def fail(self, index: int, *, timeout: bool = False, trace: str | None = None) -> None:
        self.settle(index, Verdict(reward=0.0, outcome=TIMEOUT if timeout else CRASH))
        if trace is not None:
            self.traces[index] = trace

    def report(self, function: str) -> GradingReport:
        verdicts = tuple(verdict for index, verdict in enumerate(self.verdicts) if index not in self.dropped)
        traces = [trace for index, trace in self.traces.items() if index not in self.dropped]
        if traces and len(traces) == len(verdicts):
            raise GradingError(f"grading function {function!r} raised on every one of {len(verdicts)} answers; the first:\n{traces[0]}")
        if traces:
            logger.warning("grading function %r raised on %d of %d answers, which score 0; the first:\n%s",
                           function, len(traces), len(verdicts), traces[0])  # fmt: skip
        outcomes = [verdict.outcome for verdict in verdicts]
        return GradingReport(verdicts=verdicts, timeouts=outcomes.count(TIMEOUT), crashes=outcomes.count(CRASH))
