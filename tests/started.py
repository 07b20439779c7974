"""torchrun, or this package's launcher, with its output in a file that a test reads while the ranks run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

TORCHRUN = "torch.distributed.run"
LAUNCH = "megatron_antisd.launch"
PATIENCE = 90  # seconds; most of it is importing torch on a busy machine


class Started:
    """A running launcher."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        self.process, self._file = process, file

    @property
    def output(self) -> str:
        return self._file.read_text(errors="replace")

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        """What the pattern's group matched, once it did `times` times."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            if len(found := re.findall(pattern, self.output)) >= times:
                return found
            assert not ended, f"ended without {pattern!r}:\n{self.output}"
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} after {PATIENCE} s:\n{self.output}")

    def pids(self, world_size: int) -> dict[int, int]:
        self.wait_for(r"pid of rank \d+: (\d+)\n", world_size)
        return {int(rank): int(pid) for rank, pid in re.findall(r"pid of rank (\d+): (\d+)", self.output)}

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def started(file: Path, *arguments: str, module: str = TORCHRUN) -> Iterator[Started]:
    """`arguments` as torchrun takes them. All processes are killed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    with file.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdout=output, stderr=subprocess.STDOUT,
                                   cwd=Path(__file__).parents[1])
    root = psutil.Process(process.pid)
    children: list[psutil.Process] = []
    try:
        yield Started(process, file)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = root.children(recursive=True)
        for each in (*children, root):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(10)
