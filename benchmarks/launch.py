"""Start a command, watch its memory, read a run's metrics."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
SAMPLING_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Largest sums over a command's processes, bytes."""

    resident: int
    """Resident sizes added up: pages that processes share count once for each."""
    proportional: int | None
    """Shared pages divided among those who share them; None where the system does not say."""


def run(command: Sequence[str], *, threads: int, watch_memory: bool = False, limit_seconds: float = 1800,
        cores: Collection[int] | None = None) -> Memory | None:
    """Run `command` at the project's root with `threads` threads a process; with `watch_memory` return its peak memory (reading it costs
    the watched processes time, so never where a clock runs). Raises RuntimeError with the end of its output when it fails or takes
    longer than `limit_seconds`. `cores`: those that it and its children may use; None leaves all."""
    environment = child_environment(threads)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True,
                                   preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores))
        deadline, resident, proportional = time.monotonic() + limit_seconds, 0, 0
        while process.poll() is None:
            if watch_memory:
                sizes = _sizes(psutil.Process(process.pid))
                resident, proportional = max(resident, sizes[0]), max(proportional, sizes[1])
            if time.monotonic() > deadline:
                _end(process)
                break
            time.sleep(SAMPLING_SECONDS)
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}\nended with code {process.returncode}:\n{output.read()[-4000:]}")
    return Memory(resident=resident, proportional=proportional or None) if watch_memory else None


def child_environment(threads: int) -> dict[str, str]:
    """Of a process that measures: `threads` threads, the project's packages."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def train(config: Path, directory: Path, *, processes: int = 2, threads: int = 1, watch_memory: bool = False,
          overrides: Sequence[str] = (), cores: Collection[int] | None = None) -> tuple[list[dict[str, Any]], Memory | None]:
    """One run of `megatron_antisd.train`; its rows of metrics.jsonl, and its memory where asked for. An earlier run in `directory` is removed."""
    shutil.rmtree(directory, ignore_errors=True)
    memory = run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                  "-m", "megatron_antisd.train", str(config), *overrides], threads=threads, watch_memory=watch_memory, cores=cores)
    return read_metrics(directory), memory


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of a run's training steps (evaluations have rows of their own)."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no metrics.jsonl in {directory}; expected the directory of a run")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if "seconds_total" in row]


def median(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Over rows that have a value. Raises ValueError where none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        raise ValueError(f"no row holds {key}; rows hold {sorted(rows[0]) if rows else 'nothing'}")
    return statistics.median(values)


def machine() -> str:
    """One line on where and under what load this ran."""
    import torch

    cores = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{cores}, load average {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch {torch.__version__}"


def _sizes(root: psutil.Process) -> tuple[int, int]:
    resident = proportional = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in family:
        try:
            resident += process.memory_info().rss
            proportional += _proportional(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue  # it ended meanwhile
    return resident, proportional


def _proportional(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.is_file():
        return 0
    return next((int(line.split()[1]) * 1024 for line in rollup.read_text().splitlines() if line.startswith("Pss:")), 0)


def _end(process: subprocess.Popen[str]) -> None:
    """End a command and its children."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for child in alive:
        child.kill()
    process.wait()
