"""A world of one in this process: stages, an end that leaves nothing running, records in the store."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_antisd.config.reliability import SupervisionConfig
from megatron_antisd.supervision import Preempted, Supervisor, preemption
from megatron_antisd.supervision.board import Board
from megatron_antisd.supervision.records import Alarm, RankRecord

CONFIG = SupervisionConfig(heartbeat_seconds=0.05, silence_seconds=60, generate_seconds=50, evaluate_seconds=70, other_seconds=30)


def make(tmp_path: Path) -> Supervisor:
    return Supervisor(CONFIG, directory=tmp_path, store=dist.HashStore(), rank=0, world_size=1)


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_normal_end_leaves_nothing(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with make(tmp_path) as supervisor:
        assert len(watchdogs()) == 1
        with supervisor.stage("generate", 1):
            time.sleep(0.2)
    supervisor.close()
    assert not watchdogs() and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_time_outs_by_name_and_nested_stages(tmp_path: Path) -> None:
    with make(tmp_path) as supervisor:
        def standing() -> tuple[str, int | None, float]:
            stage = supervisor._watchdog.stage
            return stage.name, stage.step, stage.limit

        assert standing() == ("between stages", None, 30)
        with supervisor.stage("evaluate", 3):
            assert standing() == ("evaluate", 3, 70)
            before = time.monotonic() - supervisor._watchdog.stage.begun
            with supervisor.stage("generate", 3):
                assert standing() == ("generate", 3, 50)
                time.sleep(0.3)
            assert standing() == ("evaluate", 3, 70)
            assert time.monotonic() - supervisor._watchdog.stage.begun < before + 0.2  # its clock stood still
        assert standing() == ("between stages", None, 30)
        with pytest.raises(KeyError), supervisor.stage("figures", 3):
            assert standing() == ("figures", 3, 30)
            raise KeyError
        assert standing() == ("between stages", None, 30)  # an error that the loop deals with


@pytest.mark.parametrize(("error", "explained"), [(Preempted("saved"), False), (SystemExit(2), False), (ValueError("boom"), True)])
def test_exceptions_pass_through(tmp_path: Path, error: BaseException, explained: bool, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(type(error)), make(tmp_path) as supervisor:
        with supervisor.stage("generate", 1):
            raise error
    preemption.uninstall()  # after a failure the signals are ignored
    assert not watchdogs()
    assert ("rank 0" in caplog.text and "failed in stage generate of step 1 by ValueError: boom" in caplog.text) == explained
    if explained:
        assert "ValueError: boom" in (tmp_path / "hangs/rank_00000.txt").read_text()


def test_what_comes_after_the_end_is_told_to_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stop that all ranks agreed on, and an error that was told before anything was closed."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="agreed"), make(tmp_path) as supervisor:
        supervisor.close()
        began = time.monotonic()
        raise ValueError("agreed")
    assert time.monotonic() - began < 1 and not caplog.text and signal.getsignal(signal.SIGTERM) is before


def test_the_board() -> None:
    store = dist.HashStore()
    board = Board(store, 2)
    record = RankRecord(rank=1, host="h", pid=1, namespace="n", stage="s", step=None, stage_seconds=0, stages=1, beat=1)
    board.post(record)
    assert board.record(0) is None and board.record(1) == record and board.records() == {1: record}
    assert board.alarm() is None and board.report() is None
    first, second = (Alarm(rank=rank, stage="s", step=1, reason="r") for rank in (0, 1))
    assert board.raise_alarm(first) == first and board.raise_alarm(second) == first and board.alarm() == first
    board.count_answer()
    assert not board.all_answered()
    board.count_answer()
    assert board.all_answered()
    assert (board.next_failure(), board.next_failure()) == (1, 2)
    assert Board(store, 2).records() == {}  # a later run in the same processes


def test_importing_the_room_is_cheap() -> None:
    program = "import sys, megatron_antisd.supervision; assert not {'megatron', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
