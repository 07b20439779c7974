"""Files that survive a crash: written whole or not at all, on disk when the call returns, and told apart from damaged ones by their digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file whole or not at all; when this returns, it survives a crash."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def append_whole(path: Path, data: bytes) -> None:
    """Append; when this returns, it survives a crash. Where it fails (a full disk), the file is cut back to what it was and OSError raised."""
    new = not path.is_file()
    with path.open("ab", buffering=0) as file:  # a buffer would write the rest when it is closed, behind the cut
        size, left = file.tell(), memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise
    if new:
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """To disk for good, but not by way of another name: for files in a folder that gets its own name later."""
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """A file's content, or a directory's list of names, to disk for good."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
