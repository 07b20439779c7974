"""torch.distributed.checkpoint's writer of tensor files, with the digest of what it wrote and the true reason where it could not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem


class TensorFileWriter(FileSystemWriter):
    """Writes this rank's file. `written` then has its size and SHA-256, taken of the bytes on their way out: what the disk makes of them later
    shows as a difference."""

    def __init__(self, directory: Path) -> None:
        # Nothing to copy ahead of writing: tensors are in host memory, and torch's loader for GPUs would wait for kernels of training.
        super().__init__(directory, per_thread_copy_ahead=0)
        self.fs = _WatchedFiles()

    @property
    def written(self) -> dict[str, tuple[int, str]]:
        """Name below the directory -> (bytes, SHA-256)."""
        return {stream.name: (stream.size, stream.digest.hexdigest()) for stream in self.fs.streams}

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().write_data(*arguments, **options)
        except RuntimeError as error:  # how torch.save tells of a write that failed, without why
            failures = [stream.failure for stream in self.fs.streams if stream.failure is not None]
            raise failures[0] if failures else error from error


class _WatchedFiles(FileSystem):
    def __init__(self) -> None:
        super().__init__()
        self.streams: list[_WatchedStream] = []

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as file:
            if mode != "wb" or not Path(path).name.endswith(".distcp"):
                yield file
                return
            self.streams.append(_WatchedStream(file, Path(path).name))
            yield self.streams[-1]


class _WatchedStream:
    """A file that is written from beginning to end."""

    def __init__(self, file: io.IOBase, name: str) -> None:
        self._file, self.name, self.size = file, name, 0
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.failure = error
            raise

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        """Left to whoever opened it."""
