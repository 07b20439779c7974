"""Run a script on several real ranks (gloo or NCCL, the script's choice) from within a test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

TAIL_LINES = 60


def run_ranks(
    script: Path | str,
    nproc: int,
    *args: str,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
) -> str:
    """Start `script args` on `nproc` ranks with torchrun and return what they wrote to stdout.

    Each call gets its own rendezvous on a port the system picks, so tests may run at the same time. `env` is laid
    over the present environment. `timeout` is in seconds; when it passes, every rank is killed.

    Raises AssertionError, with the last lines of stdout and stderr, when a rank fails or the time is up.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc),
        str(script), *(str(arg) for arg in args),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_tree(process)
        stdout, stderr = process.communicate()
        raise AssertionError(f"{script} on {nproc} ranks: not done after {timeout} s\n{_tail(stdout, stderr)}") from None
    except BaseException:
        _kill_tree(process)
        process.communicate()
        raise
    if process.returncode != 0:
        raise AssertionError(f"{script} on {nproc} ranks: exit code {process.returncode}\n{_tail(stdout, stderr)}")
    return stdout


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # A test that itself runs under torchrun must not hand its own rank to the ranks it starts.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return {**environment, **(extra or {})}


def _kill_tree(process: subprocess.Popen[str]) -> None:
    """Kill torchrun and all it started. A signal to the process group would miss the ranks: torchrun gives each its own session."""
    try:
        root = psutil.Process(process.pid)
        everyone = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return  # it ended by itself in between
    for each in everyone:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everyone[1:], timeout=10)


def _tail(stdout: str, stderr: str) -> str:
    parts = []
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        lines = (text or "").splitlines()[-TAIL_LINES:]
        parts.append("\n".join([f"--- last lines of {name} ---", *lines]))
    return "\n".join(parts)
