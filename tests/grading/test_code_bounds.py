"""Answers that are made to stop, to slow down or to mislead the grader itself, which holds what the sandbox let out."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from megatron_antisd.grading import GradingError, GradingPool, GradingTask
from megatron_antisd.grading.code import count_passed, grade_code
from megatron_antisd.grading.extraction import extract_program
from megatron_antisd.grading.parsed import ParsedCases
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.grading.sandbox_choice import probe
from megatron_antisd.records import CodeTests

MODE = "builtin"


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> Iterator[None]:
    global MODE
    modes = [mode for mode in ("bubblewrap", "builtin") if probe(mode).works]
    if not modes:
        pytest.skip(f"no sandbox works here: {probe('builtin').reason}")
    MODE = modes[0]
    yield


def settings(seconds: float = 20.0, case_seconds: float = 5.0, memory_bytes: int = 1 << 30) -> SandboxSettings:
    return SandboxSettings(mode=MODE, seconds=seconds, case_seconds=case_seconds, memory_bytes=memory_bytes)


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


@pytest.mark.parametrize("line", ["``` " + " " * 900 + "`", "~" * 900 + "`", " " * 900 + "`", "```" + "a" * 900 + "`", "`" * 900 + "x`"])
def test_a_response_of_half_fences_is_read_in_linear_time(line: str) -> None:
    started = time.process_time()
    assert extract_program("\n".join([line] * 500)) in (None, line)
    assert extract_program(line * 500) is None
    assert time.process_time() - started < 1.0  # 0.01 s; a quadratic pattern takes 4 s or more


def test_nested_markdown_is_looked_into_up_to_a_depth() -> None:
    """Ten thousand levels cost no more than four, and no recursion."""
    def wrapped(depth: int) -> str:
        text = "```python\na = 1\n```"
        for level in range(depth):
            mark = "~`"[level % 2] * (4 + level // 2)
            text = f"{mark}markdown\n{text}\n{mark}"
        return text

    assert extract_program(wrapped(4)) == "a = 1"
    assert "a = 1" in extract_program(wrapped(5)) and extract_program(wrapped(5)) != "a = 1"
    assert extract_program(wrapped(900)) is not None


@pytest.mark.parametrize(("checker", "why"), [
    ("def chek(): pass", "KeyError: 'check'"), ("def check(:", "SyntaxError"), ("def check(a, b): return True", "TypeError"),
    ("def check(a, b, c): raise ValueError('no')", "ValueError: no"), ("import os\ndef check(a, b, c): os._exit(0)", "the process ended"),
])  # fmt: skip
def test_a_checker_that_judges_nothing_is_an_error(checker: str, why: str) -> None:
    tests = CodeTests(entry_point="root", cases=(("(4,)", "2"),), checker=checker)
    with pytest.raises(GradingError, match=f"judges not even the expected values.*{why}"):
        count_passed("def root(x): return 2", tests, settings())


COPIES = "def check(arguments, output, expected):\n    return [list(x) if isinstance(x, list) else x for x in output] * 60 == expected * 60"


def test_what_a_checker_holds_of_a_program_ends_no_run() -> None:
    """The judge's memory or time may run out over outputs: those cases are lost, those before stand, and nobody else's."""
    tests = CodeTests(entry_point="f", cases=tuple((f"({i},)", f"[{i}]") for i in range(3)), checker=COPIES)
    good, bad = (GradingTask(response=fenced(f"def f(x): return {value}"), answer="", tests=tests)
                 for value in ("[x]", "[[]] * 150_000 if x else [x]"))
    with GradingPool(workers=1, timeout_seconds=5.0, sandbox=settings(memory_bytes=96 << 20)) as pool:
        report = pool.grade_many([good, bad, good])
    assert (report.rewards, report.timeouts, report.crashes) == ((1.0, 1 / 3, 1.0), 0, 0)


def test_a_checker_that_dies_of_a_value_has_judged_those_before() -> None:
    checker = "import os\ndef check(arguments, output, expected):\n    return os._exit(0) if output == 9 else output == expected"
    tests = CodeTests(entry_point="f", cases=(("(1,)", "1"), ("(2,)", "2"), ("(3,)", "3")), checker=checker)
    assert count_passed("def f(x): return 9 if x == 2 else x", tests, settings()) == (1, False)


def test_a_checker_that_a_value_keeps_busy_runs_out_of_time() -> None:
    checker = "def check(arguments, output, expected):\n    return bool(abs(output) ** abs(output) % 3 + 1)"
    tests = CodeTests(entry_point="f", cases=(("(1,)", "2"), ("(2,)", "2"), ("(3,)", "2")), checker=checker)
    verdict = grade_code(fenced("def f(x): return 2 if x == 1 else (1 << 15_000_000) - 1"), tests, settings(1.5, 1.5))
    assert (verdict.reward, verdict.outcome) == (1 / 3, "out_of_time")


def test_an_output_too_large_for_a_checker_fails_its_case_alone() -> None:
    tests = CodeTests(entry_point="f", cases=(("(1,)", "1"), ("(2,)", "2")), checker="def check(arguments, output, expected): return True")
    assert count_passed("def f(x): return 7 if x == 2 else 1 << 36_000_000", tests, settings()) == (1, False)


def test_an_iterations_end_in_the_program_ends_no_test() -> None:
    tests = CodeTests(entry_point="f", assertions=("assert all(map(lambda x: candidate(x) == x * 2, range(5)))", "assert list(map(f, [1])) == []"))
    assert count_passed("def f(x): raise StopIteration", tests, settings()) == (0, False)


FORGED = """
import sys
def frame(text):
    here = sys._getframe()
    while "wire" not in here.f_locals:
        here = here.f_back
    here.f_locals["wire"].send(text)
def f(x):
    if x == 1:
        numbers = [str((2 ** 61 - 1) * i) for i in range(1, 60_001)]
        frame('["case",0,["s",' + ",".join(numbers) + ']]')
        frame('["case",1,["d",' + ",0,".join(numbers) + ',0]]')
    return [x]
"""
LIST = "def f(x): return [x] if x == 3 else [(2 ** 61 - 1) * i for i in range(60_000)]"


@pytest.mark.parametrize("program", [LIST, LIST.replace("* i for", "* i + 0j for"), FORGED])
def test_colliding_hashes_do_not_hold_up_the_grader(program: str) -> None:
    """The third case is honest: what the first two send costs them alone."""
    tests = CodeTests(entry_point="f", cases=(("(1,)", "[1]"), ("(2,)", "[2]"), ("(3,)", "[3]")), compare="unordered")
    started = time.monotonic()
    assert grade_code(fenced(program), tests, settings(4.0, 2.0)).reward == 1 / 3
    assert time.monotonic() - started < 10.0  # 20 s and more when a set is made of them


def test_a_program_that_hangs_on_all_cases_is_given_up() -> None:
    tests = CodeTests(entry_point="f", cases=tuple((f"({i},)", "1") for i in range(1000)))
    verdict = grade_code(fenced("def f(x):\n    while True: pass"), tests, settings(20.0, 0.2))
    assert (verdict.reward, verdict.outcome) == (0.0, "graded")


def test_a_timer_that_the_program_caught_once_ends_the_case_all_the_same() -> None:
    tests = CodeTests(entry_point="f", cases=(("(1,)", "1"), ("(2,)", "2")))
    program = """
def f(x):
    try:
        while x == 1: pass
    except BaseException: pass
    while x == 1: pass
    return x"""
    verdict = grade_code(fenced(program), tests, settings(20.0, 0.3))
    assert (verdict.reward, verdict.outcome) == (0.5, "graded")


def test_the_values_of_cases_are_kept_by_their_size() -> None:
    kept = ParsedCases(max_characters=100)
    small = [((f"({i},)", "'" + "a" * 20 + "'"),) for i in range(10)]
    values = [kept.get(cases, True) for cases in small]
    assert len(kept) == 3 and kept.get(small[-1], True) is values[-1] and kept.get(small[0], True) is not values[0]
    assert kept.get((("", "a" * 1000),), False) == ([""], ["a" * 1000]) and len(kept) == 1
