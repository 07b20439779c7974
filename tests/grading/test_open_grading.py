"""Gradings that stay open while others work: time-outs that nobody looks at, those given up, ended ones, and workers left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_antisd.grading import GradingError, GradingPool, GradingTask

GRADERS = """
    import os, sys, time

    def act(response, answer):
        if response == "sleep":
            time.sleep(float(answer))
        if response == "raise_late":
            time.sleep(float(answer))
            raise RuntimeError("late")
        if response == "half_a_message":
            os.write(int(sys.argv[2]), (1000).to_bytes(4, "big") + b"half of it")
            os._exit(1)
        if response == "spin":
            while True:
                pass
        return 1.0
"""


def task(response: str, answer: str = "") -> GradingTask:
    return GradingTask(response=response, answer=answer)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("graders")
    (folder / "patient_graders.py").write_text(textwrap.dedent(GRADERS))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=1, timeout_seconds=1.0, function="patient_graders:act") as own:
        yield own


@pytest.mark.parametrize("response", ["sleep", "raise_late"])
def test_a_late_verdict_counts_as_late_however_seldom_one_looks(pool: GradingPool, response: str) -> None:
    with pool.open() as grading:
        grading.add(task(response, "1.5"))
        grading.add(task("quick"))
        grading.poll()
        time.sleep(2.5)
        report = grading.report()
    assert (report.rewards, report.timeouts, report.crashes) == ((0.0, 1.0), 1, 0)
    assert report.count("timeout") == 1


@pytest.mark.slow
def test_a_hanging_answer_that_nobody_looks_at_is_a_timeout(pool: GradingPool) -> None:
    with pool.open() as grading:
        grading.add(task("spin"))
        grading.poll()
        time.sleep(13)
        report = grading.report()
    assert (report.timeouts, report.crashes) == (1, 0)


def test_a_worker_killed_in_the_middle_of_a_message_costs_its_answer(pool: GradingPool) -> None:
    report = pool.grade_many([task("half_a_message"), task("quick")])
    assert (report.rewards, report.crashes) == ((0.0, 1.0), 1)


def test_what_is_given_up_frees_the_pool() -> None:
    with GradingPool(workers=2, timeout_seconds=60.0, function="patient_graders:act") as pool:
        before = {worker.process.pid for worker in pool._workers}
        with pytest.raises(ZeroDivisionError), pool.open() as grading:
            for one in (task("spin"), task("quick"), task("spin"), task("spin")):
                grading.add(one)
            grading.poll()
            1 / 0  # noqa: B018  (generation fails)
        assert not before & {worker.process.pid for worker in pool._workers}, "both were busy"
        rewards: list[float] = []
        other = threading.Thread(target=lambda: rewards.extend(pool.grade_many([task("quick")] * 3).rewards), daemon=True)
        other.start()
        other.join(20)
        assert rewards == [1.0] * 3


def test_a_grading_ends_once(pool: GradingPool) -> None:
    grading = pool.open()
    grading.add(task("quick"))
    assert grading.report().rewards == (1.0,)
    grading.abandon()
    grading.abandon()
    for again in (grading.report, grading.poll):
        with pytest.raises(GradingError, match="this grading has ended"):
            again()
    assert pool.grade_many([task("quick")]).rewards == (1.0,)
    given_up = pool.open()
    given_up.abandon()
    with pytest.raises(GradingError, match="this grading has ended"):
        given_up.report()


def test_a_grading_that_is_dropped_frees_the_pool(pool: GradingPool, caplog: pytest.LogCaptureFixture) -> None:
    grading = pool.open()
    grading.add(task("spin"))
    grading.poll()
    del grading
    gc.collect()
    assert "dropped without report or abandon" in caplog.text
    rewards: list[float] = []
    other = threading.Thread(target=lambda: rewards.extend(pool.grade_many([task("quick")]).rewards), daemon=True)
    other.start()
    other.join(20)
    assert rewards == [1.0]


def test_a_report_after_the_pools_end_says_so(pool: GradingPool) -> None:
    grading = pool.open()
    grading.add(task("quick"))
    grading.poll()
    pool.close()
    with pytest.raises(GradingError, match="the grading pool is closed"):
        grading.report()
    grading.abandon()
    with pytest.raises(GradingError, match="the grading pool is closed"):
        pool.open()


def test_a_busy_worker_ends_soon_after_its_parent(folder: Path) -> None:
    program = (
        "import os, sys\nfrom megatron_antisd.grading import GradingPool, GradingTask\n"
        "pool = GradingPool(workers=1, timeout_seconds=60.0, function='patient_graders:act')\n"
        "grading = pool.open()\ngrading.add(GradingTask(response='spin', answer=''))\ngrading.poll()\n"
        "print(pool._workers[0].process.pid, flush=True)\nos._exit(1)\n")
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path},
                          stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 15
    while _runs(stat) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(stat)


def _runs(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
