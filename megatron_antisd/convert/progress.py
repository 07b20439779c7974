"""A bar of bytes, on rank 0."""

from __future__ import annotations

from types import TracebackType

import rich.progress as bars
from rich.console import Console


class Progress:
    """Bytes done of all bytes, the rate and the time left."""

    def __init__(self, title: str, *, visible: bool) -> None:
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"), bars.BarColumn(), bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(), console=Console(stderr=True), disable=not visible)
        self._title, self._task = title, None
        self._done = self._total = 0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def begin(self, total: int, done: int = 0, title: str | None = None) -> None:
        """A new bar."""
        self._done, self._total = done, total
        self._task = self._bars.add_task(title or self._title, total=total, completed=done)

    def advance(self, nbytes: int) -> None:
        if self._task is not None and nbytes:
            self._done = min(self._done + nbytes, self._total)  # headers are not counted in the total
            self._bars.update(self._task, completed=self._done)
