"""What happened to a run, beside its numbers: resumes, preemptions, incidents, rollbacks, checkpoints that could not be written.

`journal.jsonl` is a history: a resume does not cut it back, and its lines hold the wall clock.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_antisd.durable import write_whole
from megatron_antisd.metrics.files import JOURNAL, JsonLines, read_rows

_log = logging.getLogger(__name__)


class Journal:
    """Writes `directory/journal.jsonl`; `is_writer` on one rank."""

    def __init__(self, directory: Path, *, is_writer: bool) -> None:
        self._is_writer, self._lines = is_writer, JsonLines(directory / JOURNAL, patient=True)
        if is_writer:
            _cut_off_tail(directory / JOURNAL)

    def write(self, kind: str, step: int, message: str, **values: Any) -> None:
        """A line of `kind`, at `step`; the message goes to the log as well."""
        if not self._is_writer:
            return
        _log.warning("step %d: %s", step, message)
        self._lines.append([{"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "kind": kind, "message": message, **values}])

    def close(self) -> None:
        """The last attempt at what could not be written before."""
        if self._is_writer:
            self._lines.append([])


def _cut_off_tail(path: Path) -> None:
    """Drop a last line that a crash left without its newline: the next one would be glued to it, and neither could be read."""
    data = path.read_bytes() if path.is_file() else b""
    if data and not data.endswith(b"\n"):
        write_whole(path, [data[: data.rfind(b"\n") + 1]])


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's journal, oldest first; none where there is no journal."""
    path = directory / JOURNAL
    return read_rows(path) if path.is_file() else []
