"""run_ranks itself: what the distributed tests stand on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from distributed import run_ranks

ALL_REDUCE = """
import os, sys
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor(float(dist.get_rank() + int(sys.argv[1])))
dist.all_reduce(value)
# One write with its newline: print makes two, and the ranks share the pipe.
sys.stdout.write(f"sum={value.item()} extra={os.environ.get('EXTRA')}\\n")
sys.stdout.flush()
dist.destroy_process_group()
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def test_two_runs_at_once_keep_apart(tmp_path: Path) -> None:
    path = script(tmp_path, ALL_REDUCE)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda start: run_ranks(path, 2, str(start), env={"EXTRA": f"e{start}"}), (10, 100))
    assert first.splitlines() == ["sum=21.0 extra=e10"] * 2
    assert second.splitlines() == ["sum=201.0 extra=e100"] * 2


def test_a_failing_rank_shows_its_error(tmp_path: Path) -> None:
    text = "import os\nprint('before')\nif os.environ['RANK'] == '1': raise ValueError('the reason')\n"
    with pytest.raises(AssertionError, match="(?s)2 ranks: exit code 1.*before.*ValueError: the reason"):
        run_ranks(script(tmp_path, text), 2)


@pytest.mark.slow  # waits for a time-out long enough for a busy machine to start a rank
def test_hanging_ranks_are_killed_at_the_time_out(tmp_path: Path) -> None:
    # A rank that ignores the polite signal, as one stuck in a collective does.
    text = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('started', flush=True)\n"
        f"pathlib.Path({str(tmp_path)!r}, 'pid' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    before = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)not done after 20 s.*started"):
        run_ranks(script(tmp_path, text), 1, timeout=20)
    assert time.monotonic() - before < 60
    assert not psutil.pid_exists(int((tmp_path / "pid0").read_text()))
