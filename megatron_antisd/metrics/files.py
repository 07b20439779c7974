"""The files a run writes: JSON lines that survive a crash and can be cut back to a step.

A row is an object with an integer `step`. What was appended is on the disk; a process that dies in the middle of an append leaves one
line without its newline, which is the only damage that reading forgives.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_antisd.durable import append_whole, write_whole

CONFIG = "config.yaml"
METRICS, SAMPLES, TOKEN_U, TENSORBOARD, WANDB_ID = "metrics.jsonl", "samples.jsonl", "token_u.jsonl", "tensorboard", "wandb_id.txt"
ROLLOUTS, EVALUATIONS = "rollouts", "evaluations"
STEP_0 = "step_000000"
CHECKPOINTS = "checkpoints"  # written elsewhere; an earlier run's must not be taken for a new run's
PROFILE = "profile"
ROUTING = "routing.jsonl"
INCIDENTS, JOURNAL = "incidents", "journal.jsonl"
ROLLOUT_VERSIONS = "rollout_versions"
RUN_FILES = (METRICS, SAMPLES, TOKEN_U, ROUTING, TENSORBOARD, WANDB_ID, ROLLOUTS, EVALUATIONS, CHECKPOINTS, PROFILE, INCIDENTS, JOURNAL,
             ROLLOUT_VERSIONS)

_log = logging.getLogger(__name__)


class MetricsError(ValueError):
    """A row that may not be written, or a file that cannot be read; the message names the key or the line."""


class JsonLines:
    """Appends rows to a file, which is made at the first row. What `append` returned from, survives a crash. The file is opened anew each
    time: a command may have replaced it meanwhile.

    `patient`: rows that cannot be written (a full disk) are kept, and written before the next ones; otherwise `append` raises OSError.
    """

    def __init__(self, path: Path, *, patient: bool = False) -> None:
        self._path, self._patient = path, patient
        self._kept: list[Mapping[str, Any]] = []

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        rows = [*self._kept, *rows]
        if not rows:
            return
        try:
            append_whole(self._path, b"".join(map(json_line, rows)))
        except OSError as error:
            if not self._patient:
                raise
            _log.error("%s could not be written (%s): %d lines are kept in memory until it can", self._path, error, len(rows))
            self._kept = rows
            return
        if self._kept:
            _log.info("%s: the lines that were kept in memory are written", self._path)
        self._kept = []

    def forget(self, step: int) -> None:
        """Of what is not on disk yet, `step` and what follows: they will run again."""
        self._kept = [row for row in self._kept if row["step"] < step]


def json_line(row: Mapping[str, Any]) -> bytes:
    """One line of a JSON-lines file. NaN raises ValueError; a lone surrogate in sampled text is no reason to stop."""
    return (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of one of the writer's files as they stand. A last line cut off by a crash is left out with a warning; any other
    bad line raises MetricsError."""
    return [row for _, row in _parse(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, one a step, training and evaluation merged, in the order of steps. Absent keys stay absent.

    Raises MetricsError where a line cannot be read or one step has the same key twice."""
    merged: dict[int, dict[str, Any]] = {}
    for row in read_rows(path):
        known = merged.setdefault(row["step"], {"step": row["step"]})
        twice = [key for key in row if key != "step" and key in known]
        if twice:
            raise MetricsError(f"{path}: step {row['step']} has {twice[:3]} twice; two runs wrote into one file")
        known.update(row)
    return [merged[step] for step in sorted(merged)]


def remove_from_step(path: Path, step: int) -> None:
    """Atomically remove the rows with `step` and later, and a last line cut off by a crash. What is kept, is kept byte by byte."""
    _keep_rows(path, lambda row: row["step"] < step)


def remove_step(path: Path, step: int) -> None:
    """Atomically remove the rows of one step, and a last line cut off by a crash."""
    _keep_rows(path, lambda row: row["step"] != step)


def _keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    if not path.is_file():
        return
    kept = b"".join(line + b"\n" for line, row in _parse(path) if keep(row))
    if kept == path.read_bytes():
        return
    write_whole(path, [kept])


def remove_steps(directory: Path, step: int) -> None:
    """Remove what `directory` holds of `step` and later, files `step_000010.jsonl` and folders `step_000010`: those steps run again."""
    for path in directory.glob("step_*"):
        if int(path.stem.removeprefix("step_")) >= step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each line with its row. Split at newline bytes alone: text may hold Unicode's other line ends."""
    *lines, tail = path.read_bytes().split(b"\n")
    parsed: list[tuple[bytes, dict[str, Any]]] = []
    for number, line in enumerate([*lines, tail], start=1):
        is_tail = number == len(lines) + 1
        if is_tail and not line:
            break
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("expected an object with an integer 'step'")
        except ValueError as error:
            if is_tail:  # written without its newline: the process died in the middle of the line
                _log.warning("%s: dropping the last line (%d), cut off after %d bytes", path, number, len(line))
                break
            raise MetricsError(f"{path} line {number} is broken ({error}); repair it or move the file away: {line[:80]!r}") from error
        parsed.append((line, row))
    return parsed


def move_aside(directory: Path) -> None:
    """Rename an earlier run's files in `directory` to `<name>.old-<n>`, so that a new run starts with none. The samples of step 0 stay: they are
    of the weights that a run starts from, and taken only where those are the same."""
    present = [directory / name for name in RUN_FILES if _holds_something(directory / name)]
    if not present:
        return
    number = 1
    while list(directory.glob(f"*.old-{number}")):
        number += 1
    for path in present:
        path.rename(path.with_name(f"{path.name}.old-{number}"))
    first = directory / f"{EVALUATIONS}.old-{number}" / STEP_0
    if first.is_dir():
        partial = directory / EVALUATIONS / f".{STEP_0}"  # a process that is killed here must not leave a half of it
        shutil.copytree(first, partial)
        partial.rename(directory / EVALUATIONS / STEP_0)
    _log.warning("%s held an earlier run's %s; moved to *.old-%d", directory, ", ".join(p.name for p in present), number)


def _holds_something(path: Path) -> bool:
    """An empty folder may be there beforehand, a mounted disk say, which could not be moved."""
    return any(path.iterdir()) if path.is_dir() else path.exists()
