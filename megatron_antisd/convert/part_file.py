"""A file that is hashed while it is written, and gets to disk for good while the next one is begun."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_SLICE = 8 << 20
_SMALL = 1 << 18


class PartFile:
    """Enough of a file for torch.save. A write that fails is kept in `failure`: torch reports it as something else."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self.path = path
        self.failure: BaseException | None = None
        self._file = path.open("wb", buffering=1 << 20)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(max_workers=1)
        self._advance, self._size = advance, 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), _SLICE):
                self._write_slice(view[start : start + _SLICE])
        except BaseException as error:
            self.failure = error
            raise
        return len(view)

    def _write_slice(self, view: memoryview) -> None:
        if len(view) < _SMALL:
            self._hash.update(view)
            self._file.write(view)
        else:  # both let other threads run meanwhile
            hashed = self._hasher.submit(self._hash.update, view)
            try:
                self._file.write(view)
            finally:
                hashed.result()
        self._size += len(view)
        self._advance(len(view))

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> tuple[int, str]:
        """(size, SHA-256), once everything is on disk for good."""
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self._hasher.shutdown()
        return self._size, self._hash.hexdigest()

    def abandon(self) -> None:
        """Let go of a file that could not be written."""
        self._hasher.shutdown()
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error


class Finisher:
    """Does one thing at a time behind the writer's back; the next call, or `wait`, raises what went wrong."""

    def __init__(self) -> None:
        self._pool, self._pending = ThreadPoolExecutor(max_workers=1), Future()
        self._pending.set_result(None)

    def start(self, action: Callable[[], None]) -> None:
        self.wait()
        self._pending = self._pool.submit(action)

    def wait(self) -> None:
        self._pending.result()
