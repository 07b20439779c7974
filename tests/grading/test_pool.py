"""The pool with real worker processes: hanging, dying and wrong functions, order, and that nothing is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from distributed import run_ranks

from megatron_antisd.grading import GradingError, GradingPool, GradingPoolDied, GradingTask

GRADERS = """
    import os, signal, subprocess, sys, time
    calls = 0
    table = {"a": 1}

    def act(response, answer):
        global calls
        calls += 1
        if response == "hang":
            while True:
                pass
        if response == "hang_in_c":
            return float(7 ** (10 ** 10) % 2)  # holds the GIL
        if response == "exit":
            os._exit(3)
        if response == "sys_exit":
            sys.exit("no")
        if response == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if response == "raise":
            raise RuntimeError("a bad answer")
        if response == "child":
            with open(answer, "w") as file:
                file.write(str(subprocess.Popen(["sleep", "600"]).pid))
            while True:
                pass
        if response == "calls":
            return calls
        if response == "pid":
            return os.getpid()
        if response == "heavy":
            return float("torch" in sys.modules or "vllm" in sys.modules or "sympy" in sys.modules)
        if response == "none":
            return None
        if response == "nan":
            return float("nan")
        if response == "text":
            return "1.0"
        if response == "memory":
            return len(bytearray(1 << 30))
        if response == "told":
            return 0.5, "half right: " + answer
        if response == "told_wrong":
            return 0.5, 7
        print("stdout belongs to the user")
        return float(response == answer)
"""


def tasks(pairs: Iterable[tuple[str, str]]) -> list[GradingTask]:
    return [GradingTask(response=response, answer=answer) for response, answer in pairs]


@pytest.fixture(scope="module", autouse=True)
def graders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("graders")
    (folder / "own_graders.py").write_text(textwrap.dedent(GRADERS))
    (folder / "deadly_grader.py").write_text("import os\nos._exit(4)\n")
    (folder / "broken_grader.py").write_text("import does_not_exist_anywhere\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    with GradingPool(workers=2, timeout_seconds=2.0, function="own_graders:act") as own:
        yield own


def test_500_answers_in_order() -> None:
    start = time.monotonic()
    with GradingPool(workers=2, timeout_seconds=10.0) as pool:
        started = time.monotonic() - start
        pairs = [(rf"\boxed{{\frac{{{i}}}{{2}}}}", str((i + i % 2) / 2)) for i in range(500)]
        report = pool.grade_many(tasks(pairs))
    assert report.rewards == tuple(float(i % 2 == 0) for i in range(500))
    assert (report.timeouts, report.crashes) == (0, 0)
    assert started < 20  # 0.5 s measured; loose for a machine under load


def test_a_hanging_answer_costs_only_itself(pool: GradingPool) -> None:
    pairs = [("1", "1")] * 10 + [("hang", "1")] + [("2", "1")] * 10 + [("3", "3")] * 10
    start = time.monotonic()
    report = pool.grade_many(tasks(pairs))
    seconds = time.monotonic() - start
    assert report.rewards == (1.0,) * 10 + (0.0,) * 11 + (1.0,) * 10
    assert (report.timeouts, report.crashes) == (1, 0)
    assert 2.0 <= seconds < 12
    assert pool.grade_many(tasks([("1", "1")] * 4)).rewards == (1.0,) * 4  # still alive


def test_a_hang_that_holds_the_gil_is_ended(pool: GradingPool) -> None:
    report = pool.grade_many(tasks([("hang_in_c", ""), ("1", "1")]))
    assert report.rewards == (0.0, 1.0)
    assert report.timeouts == 1


def test_more_hangs_than_workers(pool: GradingPool) -> None:
    report = pool.grade_many(tasks([("hang", "")] * 3 + [("1", "1")]))
    assert report.rewards == (0.0, 0.0, 0.0, 1.0)
    assert report.timeouts == 3


@pytest.mark.parametrize("how", ["exit", "sys_exit", "segfault"])
def test_a_dying_worker_costs_only_its_answer(pool: GradingPool, how: str) -> None:
    pairs = [("1", "1"), (how, ""), ("2", "2"), (how, ""), ("3", "3"), (how, ""), (how, "")] + [("4", "4")] * 20
    report = pool.grade_many(tasks(pairs))
    assert report.rewards == tuple(float(response == answer) for response, answer in pairs)
    assert (report.timeouts, report.crashes) == (0, 4)


def test_a_death_leaves_the_other_worker_as_it_was() -> None:
    """The worker that did not die is the same process with its memory; only the dead one is new."""
    with GradingPool(workers=2, timeout_seconds=5.0, function="own_graders:act") as pool:
        before = {worker.process.pid for worker in pool._workers}
        pool.grade_many(tasks([("exit", ""), ("1", "1")]))
        after = {worker.process.pid for worker in pool._workers}
        assert len(before & after) == 1
        (survivor,) = before & after
        pids = {int(pid) for pid in pool.grade_many(tasks([("pid", "")] * 50)).rewards}
        assert survivor in pids
        assert pids <= after


def test_state_of_a_worker_persists_between_calls() -> None:
    with GradingPool(workers=1, timeout_seconds=5.0, function="own_graders:act") as pool:
        pool.grade_many(tasks([("1", "1")] * 6))
        assert pool.grade_many(tasks([("calls", "")])).rewards == (7.0,)


def test_a_worker_killed_while_idle_loses_nothing(pool: GradingPool) -> None:
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    report = pool.grade_many(tasks([("1", "1")] * 6))
    assert report.rewards == (1.0,) * 6
    assert report.crashes == 0


def kill_all(pool: GradingPool) -> None:
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()


def kill_every_start(pool: GradingPool, starts: int) -> None:
    """All present workers, and so many of those that take their place."""
    replace, left = pool._replace, iter(range(starts))

    def replace_and_kill(slot: int, lost: str | None) -> int:
        code = replace(slot, lost)
        if next(left, None) is not None:
            pool._workers[slot].process.kill()
            pool._workers[slot].process.wait()
        return code

    pool._replace = replace_and_kill  # type: ignore[method-assign]
    kill_all(pool)


def test_workers_killed_again_and_again_are_a_dead_pool_that_is_rebuilt() -> None:
    with GradingPool(workers=2, timeout_seconds=5.0, function="own_graders:act", max_rebuilds=2) as pool:
        for _ in range(2):
            kill_every_start(pool, 3)
            assert pool.grade_many(tasks([("1", "1"), ("1", "2")] * 3)).rewards == (1.0, 0.0) * 3
            assert pool.take_rebuilds() == 1 and pool.take_rebuilds() == 0
        kill_every_start(pool, 3)
        with pytest.raises(GradingError, match=r"the grading pool died 3 times in this process, and grading\.max_rebuilds=2; the last death: "
                                               r"3 grading workers in a row died without an answer.*exit code -9"):
            pool.grade_many(tasks([("1", "1")]))
        with pytest.raises(GradingError, match="the grading pool is closed"):
            pool.grade_many(tasks([("1", "1")]))


def test_a_dead_pool_says_so_to_whoever_has_it_open(pool: GradingPool) -> None:
    grading = pool.open()
    grading.add(GradingTask(response="1", answer="1"))
    kill_every_start(pool, 3)
    with pytest.raises(GradingPoolDied, match="3 grading workers in a row died without an answer"):
        grading.report()


def test_two_workers_lost_while_starting_are_no_death(pool: GradingPool) -> None:
    kill_every_start(pool, 0)
    assert pool.grade_many(tasks([("1", "1")] * 6)).rewards == (1.0,) * 6
    assert pool.take_rebuilds() == 0


def test_a_broken_grader_is_not_tried_again(pool: GradingPool) -> None:
    pool._max_rebuilds = 3
    for kind in ("raise", "nan"):
        with pytest.raises(GradingError) as caught:
            pool.grade_many(tasks([(kind, "")] * 3))
        assert not isinstance(caught.value, GradingPoolDied)
    assert pool.take_rebuilds() == 0


def test_workers_that_cannot_live_are_a_dead_pool_at_the_start() -> None:
    with pytest.raises(GradingPoolDied, match="3 grading workers in a row died without an answer, the last while starting with exit code 4"):
        GradingPool(workers=2, timeout_seconds=1.0, function="deadly_grader:act")


def test_an_exception_is_a_crash_unless_everything_raises(pool: GradingPool) -> None:
    report = pool.grade_many(tasks([("raise", ""), ("1", "1")]))
    assert report.rewards == (0.0, 1.0)
    assert report.crashes == 1
    with pytest.raises(GradingError, match=r"(?s)own_graders:act.*raised on every one of 3.*a bad answer"):
        pool.grade_many(tasks([("raise", "")] * 3))
    assert pool.grade_many(tasks([("1", "1")])).rewards == (1.0,)


def test_children_of_a_hanging_function_are_killed_with_it(pool: GradingPool, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert pool.grade_many(tasks([("child", str(file))])).timeouts == 1
    child = int(file.read_text())
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def test_workers_do_not_import_torch_or_sympy_for_a_function_of_the_users(pool: GradingPool) -> None:
    import torch  # noqa: F401  (the parent has it, as in training)

    assert pool.grade_many(tasks([("heavy", "")])).rewards == (0.0,)


def test_large_responses_and_no_responses(pool: GradingPool) -> None:
    text = "é" * 3_000_000
    assert pool.grade_many(tasks([(text, text), (text, "x")])).rewards == (1.0, 0.0)
    assert pool.grade_many(tasks([])).rewards == ()


def test_used_from_two_threads(pool: GradingPool) -> None:
    rewards: dict[str, tuple[float, ...]] = {}

    def use(name: str) -> None:
        rewards[name] = pool.grade_many(tasks([(name, "first")] * 50)).rewards

    threads = [threading.Thread(target=use, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert rewards == {"first": (1.0,) * 50, "second": (0.0,) * 50}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.grader:act", "no_such_package.grader.*cannot be imported"),
        ("broken_grader:act", "broken_grader.*does_not_exist_anywhere"),
        ("own_graders:missing", "own_graders.*has no 'missing'"),
        ("own_graders:table", "'table' is a dict"),
        ("own_graders.act", "expected 'package.module:function'"),
        ("", "expected 'package.module:function'"),
    ],
)
def test_a_bad_dotted_path_fails_at_start(path: str, message: str) -> None:
    with pytest.raises(GradingError, match=message):
        GradingPool(workers=2, timeout_seconds=1.0, function=path)


def test_a_functions_own_feedback(pool: GradingPool) -> None:
    verdicts = pool.grade_many(tasks([("told", "x"), ("1", "1")])).verdicts
    assert [(v.reward, v.feedback, v.outcome) for v in verdicts] == [(0.5, "half right: x", "graded"), (1.0, None, "graded")]


def test_a_workers_memory_is_limited() -> None:
    with GradingPool(workers=1, timeout_seconds=5.0, function="own_graders:act", memory_bytes=1 << 29) as pool:
        report = pool.grade_many(tasks([("memory", ""), ("1", "1")]))
        assert (report.rewards, report.crashes, report.count("crash")) == ((0.0, 1.0), 1, 1)
    with GradingPool(workers=1, timeout_seconds=5.0, function="own_graders:act", memory_bytes=None) as pool:
        assert pool.grade_many(tasks([("memory", "")])).rewards == (float(1 << 30),)


def test_10000_answers_without_one_lost_in_any_order() -> None:
    """With hangs and deaths among them; each answer has its verdict wherever it stands."""
    pairs = [(str(i), str(i if i % 3 else -i)) for i in range(10_000)]
    pairs[1234], pairs[5678], pairs[9012] = ("hang", ""), ("exit", ""), ("raise", "")
    order = list(range(10_000))
    random.Random(0).shuffle(order)
    with GradingPool(workers=2, timeout_seconds=1.0, function="own_graders:act") as pool:
        first, second = pool.grade_many(tasks(pairs)), pool.grade_many(tasks([pairs[i] for i in order]))
    expected = tuple(float(response == answer) for response, answer in pairs)
    assert first.rewards == expected and second.rewards == tuple(expected[i] for i in order)
    assert (first.timeouts, first.crashes) == (second.timeouts, second.crashes) == (1, 2)


@pytest.mark.parametrize("kind", ["none", "nan", "text", "told_wrong"])
def test_a_reward_that_is_no_finite_number_is_an_error(pool: GradingPool, kind: str) -> None:
    with pytest.raises(GradingError, match=r"own_graders:act.*returned.*expected a finite float"):
        pool.grade_many(tasks([("1", "1"), (kind, "")]))


def test_close_ends_the_workers_and_refuses_work(pool: GradingPool) -> None:
    pids = [worker.process.pid for worker in pool._workers]
    pool.close()
    pool.close()
    assert not any(_runs(pid) for pid in pids)
    with pytest.raises(GradingError, match="closed"):
        pool.grade_many(tasks([("1", "1")]))


@pytest.mark.parametrize(("workers", "seconds"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))])
def test_impossible_sizes(workers: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        GradingPool(workers=workers, timeout_seconds=seconds)


RANK = """
    import os
    from megatron_antisd.grading import GradingPool, GradingTask
    rank = os.environ["RANK"]
    with GradingPool(workers=2, timeout_seconds=10.0) as pool:
        rewards = pool.grade_many([GradingTask(response=chr(92) + "boxed{%s}" % (i % 2), answer=rank) for i in range(20)]).rewards
    assert rewards == tuple(float(str(i % 2) == rank) for i in range(20)), rewards
"""


def test_a_pool_in_every_rank_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    run_ranks(script, 2, env={"PYTHONPATH": str(Path(__file__).parents[2])}, timeout=120)


MAIN = """
    import os, sys
    print("main runs", flush=True)
    import json  # no `if __name__` guard on purpose: a worker that imported this would start pools without end
    from megatron_antisd.grading import GradingPool, GradingTask
    pool = GradingPool(workers=2, timeout_seconds=5.0)
    print(pool.grade_many([GradingTask(response=text, answer="2") for text in (chr(92) + "boxed{2}", "2")]).rewards)
    print("workers", *[worker.process.pid for worker in pool._workers], flush=True)
    if "die" in sys.argv:
        os._exit(1)
"""


@pytest.mark.parametrize("end", ["normally", "die"])
def test_main_is_not_run_again_and_workers_end_with_their_parent(tmp_path: Path, end: str) -> None:
    """As training does it: `python -m package.module`, whose `__main__` no worker may import; the pool is never closed."""
    (tmp_path / "program.py").write_text(textwrap.dedent(MAIN))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "program", end], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["main runs", "(1.0, 0.0)"], done.stderr
    assert len(lines) == 3
    deadline = time.monotonic() + 10
    workers = [int(pid) for pid in lines[2].split()[1:]]
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, workers))


def _runs(pid: int) -> bool:
    """Whether the process exists and is no zombie (the ends of orphans are collected by whoever adopted them)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
