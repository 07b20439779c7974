"""How fast programs are graded in a sandbox: `python -m benchmarks.grading_code [--programs 200] [--workers 2]`.

Each program is the smallest that passes (`add`, three cases), handed to `GradingPool` as in training, so a program costs: a fresh
interpreter, its sandbox, the cases, the comparison, the pipes. The floor is what starting and ending Python alone costs, one after the
other: `python -c ""` as users write it, and `python -I -S -c ""` as the sandbox starts it, both with the interpreter behind the
environment's link. Overhead is what one sandboxed program costs beyond each, on one worker. The ways run by turns; times are medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from benchmarks.launch import machine
from megatron_antisd.grading import GradingPool, GradingTask
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.grading.sandbox_choice import MODES, probe
from megatron_antisd.records import CodeTests

TESTS = {
    "function": CodeTests(entry_point="add", cases=(("(1, 2)", "3"), ("(0, 0)", "0"), ("(-1, 1)", "0"))),
    "standard input": CodeTests(entry_point=None, cases=(("1 2\n", "3\n"), ("0 0\n", "0\n"), ("-1 1\n", "0\n"))),
    "assertions": CodeTests(entry_point="add", assertions=("assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0")),
}
PROGRAMS = {"function": "def add(a, b):\n    return a + b", "standard input": "print(sum(map(int, input().split())))",
            "assertions": "def add(a, b):\n    return a + b"}


def graded(pool: GradingPool, kind: str, count: int) -> float:
    """Seconds for `count` programs. Raises RuntimeError when one of them is not graded 1."""
    tasks = [GradingTask(response=f"```python\n{PROGRAMS[kind]}\n```", answer="", tests=TESTS[kind])] * count
    start = time.perf_counter()
    rewards = pool.grade_many(tasks).rewards
    seconds = time.perf_counter() - start
    if rewards != (1.0,) * count:
        raise RuntimeError(f"{kind}: a right program was graded {min(rewards)}")
    return seconds


def started(flags: Sequence[str], count: int) -> float:
    """Seconds for starting and ending `count` interpreters, one after the other."""
    command = [os.path.realpath(sys.executable), *flags, "-c", ""]
    start = time.perf_counter()
    for _ in range(count):
        subprocess.run(command, check=True)
    return time.perf_counter() - start


def medians(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            taken[name].append(ways[name]())
    return {name: statistics.median(values) for name, values in taken.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    count = given.programs
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}; {count} programs, {given.workers} workers\n")
    bare, isolated = "python -c ''", "python -I -S -c ''"
    floors = medians({bare: lambda: started([], count // 4), isolated: lambda: started(["-I", "-S"], count // 4)}, given.rounds)
    floor = {name: 1e3 * seconds / (count // 4) for name, seconds in floors.items()}
    print(f"{bare}: {floor[bare]:.1f} ms; {isolated}: {floor[isolated]:.1f} ms\n")
    columns = ("sandbox", "tests", f"programs/s, {given.workers} workers", "ms a program, 1 worker", f"beyond {bare}, ms", f"beyond {isolated}, ms")
    print(f"| {' | '.join(columns)} |\n|---|---|{'---:|' * (len(columns) - 2)}")
    for mode in MODES:
        found = probe(mode)
        if not found.works:
            print(f"| {mode} | does not work here: {found.reason} | | | | |")
            continue
        settings = SandboxSettings(mode=mode)
        with GradingPool(given.workers, 60.0, sandbox=settings) as many, GradingPool(1, 60.0, sandbox=settings) as single:
            for kind in TESTS:
                ways = {"many": lambda kind=kind, pool=many: graded(pool, kind, count),
                        "single": lambda kind=kind, pool=single: graded(pool, kind, count // 4)}
                seconds = medians(ways, given.rounds)
                each = 1e3 * seconds["single"] / (count // 4)
                print(f"| {mode} | {kind} | {count / seconds['many']:.0f} | {each:.1f} | {each - floor[bare]:.1f} | {each - floor[isolated]:.1f} |",
                      flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
