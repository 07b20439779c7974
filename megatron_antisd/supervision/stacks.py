"""Python stacks of all threads of this process, on stderr and in a file, also while the main thread sits in C code."""

from __future__ import annotations

import faulthandler
import os
import select
import threading
from pathlib import Path

STDERR = 2
WRITE_SECONDS = 5.0


def stack_text() -> str:
    """The stacks of all threads, the innermost call first."""
    handle = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(file=handle, all_threads=True)
        os.lseek(handle, 0, os.SEEK_SET)
        with os.fdopen(os.dup(handle), "rb") as file:
            return file.read().decode(errors="replace")
    finally:
        os.close(handle)


def write_to_stderr(text: str, rank: int) -> None:
    """Each line by itself and marked with the rank: those of all ranks go into one pipe at the same time."""
    for line in text.splitlines():
        os.write(STDERR, f"[rank {rank}] {line}\n".encode()[: select.PIPE_BUF])


def append_to_file(path: Path, text: str) -> None:
    """In a thread that is waited for only so long: a file system that hangs may be what all are waiting for."""
    thread = threading.Thread(target=_append, args=(path, text), name="supervision-file", daemon=True)
    thread.start()
    thread.join(WRITE_SECONDS)


def hang_file(directory: Path, rank: int) -> Path:
    return directory / "hangs" / f"rank_{rank:05d}.txt"


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)
