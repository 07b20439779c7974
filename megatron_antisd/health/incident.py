"""One thing that went wrong in a run, what is done about it, and the strongest of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_antisd.config.reliability import Action

Kind = Literal["non_finite", "gradient_spike", "entropy_collapse", "reward_collapse", "mismatch", "all_truncated", "noise_floor"]
"""Each is a section of the same name under `health`, but for the noise floor, which has one of its own and its limit alone."""

STRENGTH: dict[Action, int] = {"log": 0, "skip": 1, "rollback": 2, "stop": 3}
DONE: dict[Action, str] = {
    "log": "training goes on",
    "skip": "the update is left out",
    "rollback": "the run goes back to its newest checkpoint",
    "stop": "the run stops",
}


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Example: `Incident(kind="mismatch", step=12, action="log", value=0.31, limit=0.05, seen="mismatch_kl is 0.31, ...")`."""

    kind: Kind
    step: int
    action: Action
    """What is done, which `note` explains where it is not what the configuration says."""
    value: float
    """What was measured; NaN or infinite where that is what was."""
    limit: float | None
    """What it was held against; None where any finite value would do."""
    seen: str
    """What was measured, the limit, and the key that sets it."""
    note: str = ""
    """Why the action is not the configured one; empty where it is."""

    @property
    def message(self) -> str:
        """One sentence: what was seen, the limit, the keys, what is done."""
        note = f" ({self.note})" if self.note else ""
        key = "noise_floor.limit" if self.kind == "noise_floor" else f"health.{self.kind}.action"
        return f"step {self.step}: {self.seen}; {DONE[self.action]}{note} [{key}]"

    def instead(self, action: Action, note: str) -> Incident:
        """The same with another action, and why: a rollback without a checkpoint is a stop, say."""
        return dataclasses.replace(self, action=action, note=note)

    def row(self) -> dict[str, Any]:
        """For a file of JSON lines, which have no NaN: a value that is not finite is null there, and its name is in the message."""
        return {"kind": self.kind, "step": self.step, "action": self.action, "value": self.value if math.isfinite(self.value) else None,
                "limit": self.limit, "message": self.message}


def strongest(incidents: Iterable[Incident]) -> Action | None:
    """stop > rollback > skip > log; None where there is no incident."""
    return max((incident.action for incident in incidents), key=STRENGTH.__getitem__, default=None)


def refuses(incidents: Iterable[Incident]) -> bool:
    """Whether the update they were found in must not be applied: any action but `log`."""
    return any(incident.action != "log" for incident in incidents)
