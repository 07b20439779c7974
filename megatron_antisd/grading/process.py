"""A grading worker as the pool sees it: a process, its pipe and what it is busy with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe

from megatron_antisd.grading.verdict import GradingPoolDied
from megatron_antisd.grading.worker import WorkerSettings

START_SECONDS = 120.0
"""Time-out of a worker's start: importing the function's module. Generous, for a network file system with many ranks."""

_WORKER_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_antisd.grading.worker import serve; serve(int(sys.argv[2]), sys.argv[3])"
)


class Worker:
    """A worker process, its pipe and what it is busy with."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.connection, child = Pipe()
        self.ready = False
        self.index: int | None = None
        """Of the task it is grading."""
        self.seconds = 0.0
        """Wall clock that it was given for that."""
        self.deadline = time.monotonic() + START_SECONDS
        command = [sys.executable, "-c", _WORKER_CODE, json.dumps(sys.path), str(child.fileno()), settings.to_json()]
        # Its own process group, so that whatever a user's function starts is killed with the worker.
        try:
            self.process = subprocess.Popen(
                command, pass_fds=(child.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            self.connection.close()
            raise GradingPoolDied(f"a grading worker cannot be started: {error}") from error
        finally:
            child.close()

    def kill(self) -> int:
        """End the process and what it started; returns its exit code (negative: the signal)."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended already
        self.connection.close()
        return self.process.wait()
