"""The audit inside a run: every step's contexts are checked; what is wrong is said once a kind, and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_antisd.audit.alarms import empty_context_alarm, first_token_alarm, shown_solution_alarm
from megatron_antisd.audit.context import ContextInspector
from megatron_antisd.audit.solutions import SolutionCheck
from megatron_antisd.records import ScoredGroup

_log = logging.getLogger(__name__)


class ContextWatch:
    """`dtype` is the trainer's: it says how far two passes may be apart by rounding. For one rank alone."""

    def __init__(self, inspector: ContextInspector, solutions: SolutionCheck, dtype: str) -> None:
        self._inspector, self._solutions, self._dtype = inspector, solutions, dtype
        self._said: set[str] = set()

    def check(self, step: int, groups: Sequence[ScoredGroup], empty_context_u: Sequence[float]) -> int:
        """The number of defects and alarms of a step. `empty_context_u` is u of tokens that were scored without privileged context."""
        found = [(finding, defect) for group in groups for finding in self._inspector.inspect(group) for defect in finding.defects]
        for finding, defect in found:
            self._say("defect", f"step {step}, problem {finding.problem_id!r}, rollout {finding.index}: {defect}")
        alarms = {
            "first token": first_token_alarm([rollout for group in groups for rollout in group.rollouts]),
            "shown solution": shown_solution_alarm(groups, self._solutions.failing(groups)),
            "empty context": empty_context_alarm(empty_context_u, self._dtype),
        }
        for kind, alarm in alarms.items():
            if alarm is not None:
                self._say(kind, f"step {step}: {alarm}")
        return len(found) + sum(alarm is not None for alarm in alarms.values())

    def _say(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            _log.warning("context audit: %s (further ones are counted in audit_alarms; tools/context_audit.py prints them)", message)
