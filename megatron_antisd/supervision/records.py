"""What ranks tell each other about themselves, as JSON in the store."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A rank's last collective."""

    name: str
    """all_gather_object"""
    caller: str
    """The file with its folder, and the line: rollout/groups.py:60"""
    number: int
    """Collectives this rank's main thread has begun."""
    inside: bool
    """Still in it."""
    seconds: float
    """Since it began where `inside`, else since it ended."""


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """A rank's sign of life. Times are durations by its own clock: clocks of two hosts are never compared."""

    rank: int
    host: str
    pid: int
    namespace: str
    """The boot and the process table that `pid` belongs to; ranks of one namespace can look at each other's processes."""
    stage: str
    step: int | None
    stage_seconds: float
    """Since the stage began."""
    stages: int
    """Stages begun so far. All ranks pass through the same stages, so the rank with fewer is behind."""
    beat: int
    """Counts the signs of life."""
    state: Literal["running", "failed", "ended"] = "running"
    failure: str | None = None
    """The exception by which the rank failed, or left."""
    failure_order: int = 0
    """1 for the rank that failed first."""
    heard: bool = False
    """Has seen the alarm, so it is alive."""
    collective: Collective | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankRecord:
        values = json.loads(text)
        collective = values.pop("collective")
        return cls(**values, collective=Collective(**collective) if collective is not None else None)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Why the run must end, by the rank that saw it first."""

    rank: int
    stage: str
    step: int | None
    reason: str
    """Completes a sentence: "rank 2: time-out after 600 s"."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Alarm:
        return cls(**json.loads(text))
