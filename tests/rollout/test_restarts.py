"""Decoding steps that do not end, and vLLM on two ranks that breaks in the middle: what a restarted engine gives, costs and refuses."""

from __future__ import annotations

import importlib.util
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

from megatron_antisd.rollout.engine import EngineError, EngineFailure
from megatron_antisd.rollout.stalls import StallWatch

HERE = Path(__file__).resolve().parent
RSS_MIB = 12
"""Growth of a rank allowed over three restarts after the second. Measured: 1 with replicas, 4 with tensor-parallel partners."""


def spin() -> None:
    while True:
        pass


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def retry() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:  # noqa: S112  (what an engine does that never gives up)
            continue


@pytest.mark.parametrize("hang", [spin, wait_for_a_lock, retry, lambda: time.sleep(60)])
def test_what_hangs_in_python_is_interrupted(hang: Callable[[], None]) -> None:
    handler, (left, interval), watch = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL), StallWatch(0.3)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match=r"a decoding step did not end within 0\.3 s \(rollout\.stall_seconds\)"), watch.watching():
        for _ in range(3):
            with watch.step():
                pass
        with watch.step():
            hang()
    assert 0.3 <= time.monotonic() - began < 5
    now = signal.getitimer(signal.ITIMER_REAL)  # the time-out of this test, where it has one, goes on
    assert signal.getsignal(signal.SIGALRM) is handler and now[1] == interval and max(0.0, left - 6) <= now[0] <= left


def test_only_a_step_is_bounded() -> None:
    """Neither what lies between steps nor many of them together."""
    watch = StallWatch(0.4)
    with watch.watching():
        for _ in range(3):
            with watch.step():
                time.sleep(0.2)
            time.sleep(0.3)
    with watch.step():
        time.sleep(0.5)  # not opened: not watched


def test_outside_of_the_main_thread_nothing_is_watched_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    watch = StallWatch(0.1)

    def use() -> None:
        for _ in range(2):
            with watch.watching(), watch.step():
                time.sleep(0.3)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert caplog.text.count("not used from the main thread") == 1


def test_a_failure_is_an_engine_error() -> None:
    assert issubclass(EngineFailure, EngineError)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_restarted_engine_gives_what_the_first_one_would_have_given(tmp_path: Path, tensor_parallel: int) -> None:
    """Two replicas, or two partners of one replica, of which one waits inside vLLM for the one that fails."""
    run_ranks(HERE / "restart_ranks.py", 2, str(tmp_path), str(tensor_parallel), timeout=900)
    for rank in range(2):
        facts: dict[str, Any] = json.loads((tmp_path / f"facts_{rank}.json").read_text())
        for name in ("one dies", "all die", "one sleeps", "one waits", "one spins", "the update changed something", "present weights",
                     "failed update"):
            assert facts[name], name
        first, last = facts["resources"][2], facts["resources"][-1]
        assert last.pop("rss") - first.pop("rss") < RSS_MIB
        assert last == first, "threads, open files, shared memory, process groups"
        assert "exceeds the context of 512" in facts["too long"] and facts["disagreement"].startswith("ranks [1] passed other requests")
        assert facts["always"] == ("the engine failed 3 times in this process, and rollout.max_restarts=2; the last failure: generate failed on "
                                   "ranks [0, 1]: RuntimeError: out of something")
