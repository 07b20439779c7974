"""One run at a time in a directory."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from megatron_antisd.config import ConfigError

LOCK = "lock"
PATIENCE_SECONDS = 15.0
"""For a process that was just killed and is not quite gone when the launcher starts the next one."""
_log = logging.getLogger(__name__)


class RunLock:
    """Held by this process until `release`, or its end however it comes. Raises ConfigError, naming the holder, where another process has it."""

    def __init__(self, directory: Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = (directory / LOCK).open("a+")
        until = time.monotonic() + patience_seconds
        while not self._taken():
            if time.monotonic() >= until:
                holder = self._holder()
                self._file.close()
                raise ConfigError(f"run.directory={directory} is in use by another run ({holder}): wait for it, end it, or give another run.name. "
                                  "Two runs in one directory would mix their metrics and checkpoints")
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): nothing keeps a second run out of this directory", self._file.name, error)
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError):
            return "which has not said which"
