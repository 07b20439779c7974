"""Graded rollouts on disk, one JSON-lines file a step: save a run's, train another layout or method on the very same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_antisd.durable import write_whole
from megatron_antisd.records import RolloutGroup, problem_from_json, rollout_from_json
from megatron_antisd.token_routes import json_bytes


class ReplayError(ValueError):
    """A file of saved rollouts cannot be read; the message names the line."""


def save_rollouts(directory: str | Path, step: int, groups: Sequence[RolloutGroup]) -> None:
    """Write `directory/step_000001.jsonl`, a group a line; whole or not at all."""
    path = _path(directory, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, ((json.dumps(dataclasses.asdict(group), default=json_bytes) + "\n").encode() for group in groups))


def load_rollouts(directory: str | Path, step: int) -> list[RolloutGroup]:
    """Read them back, equal to what was saved. Raises FileNotFoundError naming the step that is missing."""
    path = _path(directory, step)
    if not path.is_file():
        raise FileNotFoundError(f"debug.load_rollouts: no rollouts of step {step} ({path}); save them with debug.save_rollouts={directory}")
    return read_rollouts(path)


def read_rollouts(path: Path) -> list[RolloutGroup]:
    """The groups of one file. Raises ReplayError naming the line that holds none."""
    groups = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            groups += [_group(json.loads(line))] if line else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReplayError(f"{path} line {number} holds no group of rollouts ({type(error).__name__}: {error}): {line[:80]!r}") from error
    return groups


def _group(row: dict) -> RolloutGroup:
    return RolloutGroup(problem=problem_from_json(row["problem"]), rollouts=tuple(rollout_from_json(fields) for fields in row["rollouts"]))


def _path(directory: str | Path, step: int) -> Path:
    return Path(directory) / f"step_{step:06d}.jsonl"
