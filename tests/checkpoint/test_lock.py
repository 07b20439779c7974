"""One run at a time in a directory, between real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_antisd.config import ConfigError
from megatron_antisd.metrics.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_antisd.metrics.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {holder.pid} on .*another run.name"):
            RunLock(tmp_path, patience_seconds=0.3)
        holder.send_signal(signal.SIGKILL)  # however it ends
        lock = RunLock(tmp_path, patience_seconds=10)
    finally:
        holder.kill()
        holder.wait()
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        RunLock(tmp_path, patience_seconds=0.0)
    lock.release()
    lock.release()
    RunLock(tmp_path, patience_seconds=0.0).release()


def test_patience_outlasts_a_process_that_is_nearly_gone(tmp_path: Path) -> None:
    code = HOLDER.replace("time.sleep(600)", "time.sleep(1)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    start = time.monotonic()
    RunLock(tmp_path, patience_seconds=30).release()
    assert time.monotonic() - start > 0.1
    holder.wait()
