"""Grading programs: extraction, the kinds of tests, comparison, bad input, and the canonical solutions of real benchmarks."""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_antisd.config import GradingConfig, PrivilegedConfig
from megatron_antisd.grading import GradingError, GradingPool, GradingTask
from megatron_antisd.grading.building import build_pool
from megatron_antisd.grading.code import check_tests, count_passed, grade_code, run_program
from megatron_antisd.grading.compare import matches, same_text
from megatron_antisd.grading.encoding import MAX_CHARACTERS, MAX_NODES, Opaque, decode, encode
from megatron_antisd.grading.extraction import extract_program
from megatron_antisd.grading.groups import EarlyGrading
from megatron_antisd.grading.literals import parse_literal, to_literal
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.grading.sandbox_choice import probe
from megatron_antisd.prepare.code import CodeRowError, code_problem
from megatron_antisd.records import CodeTests, Problem, Rollout, RolloutGroup

SETTINGS = SandboxSettings(mode="builtin", seconds=20.0)
ADD = CodeTests(entry_point="add", cases=(("(1, 2)", "3"), ("(2, 2)", "4"), ("(0, 0)", "0"), ("(5, -5)", "1")))


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> Iterator[None]:
    global SETTINGS
    modes = [mode for mode in ("builtin", "bubblewrap") if probe(mode).works]
    if not modes:
        pytest.skip(f"no sandbox works here: {probe('builtin').reason}")
    SETTINGS = SandboxSettings(mode=modes[0], seconds=20.0)
    yield


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


# --- extraction -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("response", "program"), [
    ("```python\na = 1\n```", "a = 1"),
    ("```python\na = 1\n```\nor\n```py\na = 2\n```\ntext", "a = 2"),
    ("```python\na = 1\n```\nIts output:\n```\n1\n```", "a = 1"),
    ("```\na = 1\n```\n```text\nb\n```", "b"),
    ("<think>```python\na = 1\n```</think>No program.", None),
    ("<think>```python\na = 1\n```</think>```python\na = 2\n```", "a = 2"),
    ("```python\na = 1\n", "a = 1"),
    ("```python\na = 1\n```python\na = 2\n```", "a = 2"),
    ("~~~python\na = 1\n~~~", "a = 1"),
    ("````markdown\n```python\na = 1\n```\n````", "a = 1"),
    ("````python\na = '''\n```\n'''\n````", "a = '''\n```\n'''"),
    ("1. So:\n   ```Python\n   if a:\n       b\n   ```", "if a:\n    b"),
    ("```{.python}\na = 1\n```", "a = 1"),
    ("```python\n\n```", None),
    ("def f(): return 1", None),
    ("`a = 1`", None),
    ("", None),
    ("```python\na = 'b\u2028c\x0cd'\r\nb = 1\r\n```", "a = 'b\u2028c\x0cd'\nb = 1"),
    ("``` `a`\n```python\na = 1\n```", "a = 1"),
])  # fmt: skip
def test_extraction(response: str, program: str | None) -> None:
    assert extract_program(response) == program


# --- verdicts -------------------------------------------------------------------------------------------------------------------------


def test_share_of_cases_and_feedback() -> None:
    verdict = grade_code(fenced("def add(a, b):\n    return a + b"), ADD, SETTINGS)
    assert (verdict.reward, verdict.feedback, verdict.outcome) == (0.75, "Your code passes 3 of 4 test cases.", "graded")


def test_no_block_is_a_counted_verdict() -> None:
    verdict = grade_code("def add(a, b):\n    return a + b", ADD, SETTINGS)
    assert (verdict.reward, verdict.outcome) == (0.0, "no_program") and "no code block" in verdict.feedback


@pytest.mark.parametrize("program", [
    "def add(a, b:", "import does_not_exist", "def sub(a, b): return a - b", "add = 3", "\0", "raise ValueError('no')", "def add(a): return a",
    "\ud800", "add = lambda a, b: " + "-" * 100_000 + "1",
])  # fmt: skip
def test_a_broken_program_scores_0(program: str) -> None:
    verdict = grade_code(fenced(program), ADD, SETTINGS)
    assert (verdict.reward, verdict.feedback) == (0.0, "Your code passes 0 of 4 test cases.")


def test_a_program_that_hangs_on_one_case_passes_the_others() -> None:
    program = "def add(a, b):\n    while a == 2:\n        pass\n    return a + b"
    verdict = grade_code(fenced(program), ADD, SandboxSettings(mode=SETTINGS.mode, seconds=20.0, case_seconds=0.5))
    assert (verdict.reward, verdict.outcome) == (0.5, "graded")


def test_the_whole_time_is_bounded() -> None:
    program = ("import signal\ndef add(a, b):\n    signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
               "    while (a, b) != (1, 2):\n        pass\n    return 3\n")
    verdict = grade_code(fenced(program), ADD, SandboxSettings(mode=SETTINGS.mode, seconds=1.5, case_seconds=0.5))
    assert (verdict.reward, verdict.outcome) == (0.25, "out_of_time")


@pytest.mark.parametrize(("program", "passed"), [
    ("a, b = map(int, input().split())\nprint(a + b)", 2),
    ("import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), end='  \\n\\n\\n')", 2),
    ("import sys\nsys.stdout.write('3\\n'); sys.exit(0)", 1),
    ("print(3)\nraise SystemExit(1)", 0),
    ("print(3)\nraise ValueError", 0),
    ("print(3); print('debug')", 0),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\nprint(P(3).x)", 1),
    ("import os\nos.write(1, b'3\\n')\nos._exit(0)", 1),
    ("import threading\nt = threading.Thread(target=lambda: print(3))\nt.start(); t.join()", 1),
])  # fmt: skip
def test_programs_on_standard_input(program: str, passed: int) -> None:
    tests = CodeTests(entry_point=None, cases=(("1 2\n", "3\n"), ("4 5\n", "9")))
    assert count_passed(program, tests, SETTINGS) == (passed, False)


def test_assertions_run_where_the_program_is_not() -> None:
    tests = CodeTests(entry_point="add", preamble="import math", assertions=(
        "assert add(1, 2) == 3", "assert candidate([1], [2]) == [1, 2]", "assert math.isclose(add(0.1, 0.2), 0.3)", "assert add(1, b=1) == 3",
        "try:\n    add(1, 'a')\nexcept TypeError:\n    pass\nelse:\n    assert False"))  # fmt: skip
    assert count_passed("def add(a, b): return a + b", tests, SETTINGS) == (4, False)
    cheat = "import builtins\nbuiltins.AssertionError = KeyError\nclass Same:\n    __eq__ = lambda s, o: True\ndef add(a, b): return Same()"
    assert count_passed(cheat, tests, SETTINGS) == (0, False)
    assert count_passed("def add(a, b): raise SystemExit(0)", tests, SETTINGS) == (0, False)
    assert count_passed("import os\ndef add(a, b): os._exit(0)", tests, SETTINGS) == (0, False)


def test_a_checker_accepts_several_values() -> None:
    tests = CodeTests(entry_point="root", cases=(("(4,)", "2"), ("(9,)", "3"), ("(2,)", "2")),
                      checker="def check(arguments, output, expected):\n    return output ** 2 == arguments[0]")  # fmt: skip
    assert count_passed("def root(x): return -x ** 0.5", tests, SETTINGS) == (2, False)
    assert count_passed("def root(x): return 'a'", tests, SETTINGS) == (0, False)


@pytest.mark.parametrize(("tests", "message"), [
    (CodeTests(entry_point="f"), "no tests"),
    (CodeTests(entry_point="f", cases=(("1", "2"),)), "tuple of the function's arguments"),
    (CodeTests(entry_point="f", cases=(("(1,)", "f(2)"),)), "not a Python literal.*f\\(2\\)"),
    (CodeTests(entry_point="f", cases=(("(1,", "2"),)), "not a Python literal"),
    (CodeTests(entry_point="f", cases=(("(1,)", "2"),), compare="same"), "compare is 'same', expected one of equal"),
    (CodeTests(entry_point=None, assertions=("assert True",)), "need an entry_point"),
])  # fmt: skip
def test_broken_tests_are_an_error(tests: CodeTests, message: str) -> None:
    with pytest.raises(GradingError, match=message):
        check_tests(tests)
    with pytest.raises(GradingError, match=f"(?s)problem 'p'.*{message}"):
        build_pool(GradingConfig(), [Problem(id="p", prompt="", answer="", tests=tests)])


def test_a_helper_for_graders_of_ones_own() -> None:
    outcomes = run_program("def f(x): return 1 / x", [(2,), (0,)], SETTINGS, entry_point="f")
    assert outcomes[0].value == 0.5 and outcomes[1].error == "ZeroDivisionError: division by zero"
    (outcome,) = run_program("print(input() * 2)", ["ab"], SETTINGS)
    assert outcome.value == "abab\n"


# --- values ---------------------------------------------------------------------------------------------------------------------------


class Text(str):
    __eq__ = lambda self, other: True  # noqa: E731
    __hash__ = str.__hash__


VALUES = [None, True, 0, -1, 1 << 70, -(10**5000), 1.5, -0.0, float("inf"), float("-inf"), 2 + 3j, "", "é\0\ud800\"\\", b"\0\xff", [], (), (1,),
          [1, [2, (3,)]], set(), {1, 2}, frozenset(), frozenset({(1, 2)}), {}, {"a": [1], 2: None, (1,): {3}}, [None, True, "x", ["l"]]]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_survive_both_ways(value: Any) -> None:
    for back in (decode(json.loads(encode(value))), parse_literal(to_literal(value))):
        assert back == value and type(back) is type(value)


def test_nan_and_subclasses() -> None:
    back = decode(json.loads(encode([float("nan")])))[0]
    assert type(back) is float and math.isnan(back)
    nan, *infinities = parse_literal("[nan, inf, -inf]")
    assert math.isnan(nan) and infinities == [float("inf"), float("-inf")]
    assert type(decode(json.loads(encode(Text("a"))))) is str


@pytest.mark.parametrize("text", ['["l",["x","y"]]', '["q",1]', '["d",1]', '["s",["l"]]', '["i",5]', '["c",1]', '["b","zz"]', "[]", "[[]]", '{"a":1}',
                                  '{"l":1,"2":3}', '["x",["y"]]', '"x' + "y" * MAX_CHARACTERS + '"', '["l"' + ",1" * MAX_NODES + "]",
                                  '["l",' * 102 + "1" + "]" * 102,
                                  '["c",1' + "0" * 400 + ',0]', "[" * 900 + "]" * 900])  # fmt: skip
def test_forged_values_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no encoded value"):
        decode(json.loads(text))


@pytest.mark.parametrize(("output", "expected", "how", "tolerance", "verdict"), [
    (True, 1, "equal", 0, True), (1, 1.0, "equal", 0, True), ([1], (1,), "equal", 0, False), (0.1 + 0.2, 0.3, "equal", 0, False),
    (0.1 + 0.2, 0.3, "equal", 1e-6, True), ([0.1 + 0.2], [0.3], "equal", 1e-6, True), ((0.3001,), [0.3], "equal", 1e-2, False),
    (3, 3.0000001, "equal", 1e-6, False), ({"a": 0.3000000001}, {"a": 0.3}, "equal", 1e-6, True), (float("nan"), float("nan"), "equal", 0, True),
    (float("inf"), 1.0, "equal", 1e9, False), (10**400, 1.0, "equal", 1e-6, False), ([1, 2, 2], (2, 1), "unordered", 0, True),
    ([[1]], [[1]], "unordered", 0, False), (5, [1], "unordered", 0, False), (Opaque("Match"), True, "not_none", 0, True),
    (None, True, "not_none", 0, False), (None, False, "not_none", 0, True), (False, True, "not_none", 0, False),
    ("abc", ["c", "a", "b"], "unordered", 0, True),
    (Opaque("Match"), Opaque("Match"), "equal", 0, False), (True, 1.0000001, "equal", 1e-3, False), ("a", "a ", "equal", 0, False),
])  # fmt: skip
def test_comparison(output: Any, expected: Any, how: str, tolerance: float, verdict: bool) -> None:
    assert matches(output, expected, how, tolerance) is verdict


@pytest.mark.parametrize(("output", "expected", "tolerance", "verdict"), [
    ("1\n2", "1  \n2\n\n", 0, True), ("1 2", "1  2", 0, False), (" 1", "1", 0, False), ("0.30000001", "0.3", 0, False),
    ("0.30000001", "0.3", 1e-6, True), ("a 0.3", "b 0.3", 1e-6, False), ("", "\n", 0, True), ("1", "1 1", 1e-6, False),
    ("1_0", "10", 1e-6, False), ("1\x0c2", "1\n2", 0, False), ("1\u20282", "1\n2", 0, False), ("1\r\n2\r3", "1\n2\n3\n", 0, True),
])  # fmt: skip
def test_comparison_of_texts(output: str, expected: str, tolerance: float, verdict: bool) -> None:
    assert same_text(output, expected, tolerance) is verdict


# --- the pool and groups --------------------------------------------------------------------------------------------------------------


def test_groups_of_math_and_code_together() -> None:
    problems = [Problem(id="m", prompt="", answer="4"), Problem(id="c", prompt="", answer="", tests=ADD)]
    texts = [["\\boxed{4}", "\\boxed{5}"], [fenced("def add(a, b): return a + b"), "none"]]
    groups = [RolloutGroup(problem=problem, rollouts=tuple(
        Rollout(problem_id=problem.id, index=j, prompt_ids=(1,), response_ids=(i, j), engine_log_probs=(0.0, 0.0), truncated=False,
                policy_version=0, text=text)
        for j, text in enumerate(pair))) for i, (problem, pair) in enumerate(zip(problems, texts, strict=True))]
    feedback = PrivilegedConfig()
    with build_pool(GradingConfig(), problems) as pool:
        grading = EarlyGrading(pool, problems, 2, lambda ids: texts[ids[0]][ids[1]])
        grading([(2 * i + j, (i, j)) for i in range(2) for j in range(2)])
        graded = grading.complete(groups, feedback).groups
    assert [[rollout.reward for rollout in group.rollouts] for group in graded] == [[1.0, 0.0], [0.75, 0.0]]
    assert [rollout.feedback for group in graded for rollout in group.rollouts] == [
        feedback.correct, feedback.incorrect, "Your code passes 3 of 4 test cases.", "Your answer contains no code block."]


def test_a_pool_without_a_sandbox_refuses_programs() -> None:
    with GradingPool(workers=1, timeout_seconds=5.0) as pool, pytest.raises(GradingError, match="without a sandbox"):
        pool.grade_many([GradingTask(response="", answer="", tests=ADD)])


# --- published benchmarks -------------------------------------------------------------------------------------------------------------

ROW = {"task_id": "HumanEval/0", "prompt": 'import math\n\ndef half(x):\n    """Half."""\n', "entry_point": "half",
       "canonical_solution": "    return x / 2\n", "base_input": [[1], [3]], "plus_input": [[5]], "atol": 0}  # fmt: skip
PLUS_TEST = ("import numpy as np\n\ndef check(candidate):\n    inputs = [[1], [3]]\n    results = [0.5, inf]\n"
             "    for pair in zip(inputs, results):\n        pass\n")
MBPP = {"task_id": 2, "text": "Write a function to halve.", "code": "def halve(x):\n    return x / 2", "test_list": ["assert halve(2) == 1"],
        "test_setup_code": "import math", "challenge_test_list": []}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), [
    (ROW, CodeTests(entry_point="half", preamble="import math", tolerance=1e-6, cases=(("(1,)", "0.5"), ("(3,)", "1.5"), ("(5,)", "2.5")))),
    ({**{k: ROW[k] for k in ("task_id", "prompt", "entry_point", "canonical_solution")}, "test": PLUS_TEST},
     CodeTests(entry_point="half", preamble="import math", tolerance=1e-6, cases=(("(1,)", "0.5"), ("(3,)", "inf")))),
    ({**{k: ROW[k] for k in ("prompt", "entry_point")}, "test": "M = 1\n\ndef check(candidate):\n    assert candidate(2) == M\n    assert True\n"},
     CodeTests(entry_point="half", preamble="import math", assertions=("M = 1\nassert candidate(2) == M",))),
    (MBPP, CodeTests(entry_point="halve", assertions=("import math\nassert halve(2) == 1",))),
    ({"question": "q", "input_output": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'}, CodeTests(entry_point=None, cases=(("1\n", "2\n"),))),
    ({"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": '{"inputs": ["1\\n"], "outputs": ["2\\n"]}'}},
     CodeTests(entry_point=None, cases=(("1\n", "2\n"),))),
])  # fmt: skip
def test_published_forms(row: dict[str, Any], expected: CodeTests) -> None:
    assert code_problem(row, SETTINGS)[1] == expected


def test_calls_of_apps_are_compared_as_json() -> None:
    prompt, tests = code_problem({"question": "Pairs.", "starter_code": "class Solution:", "input_output": {
        "fn_name": "pairs", "inputs": [[[1, 2]], [[3]]], "outputs": [[[[1, 2]]], [[[3]]]]}}, SETTINGS)  # fmt: skip
    assert prompt.endswith("class Solution:")
    assert count_passed("class Solution:\n    def pairs(self, x): return [tuple(x)]", tests, SETTINGS) == (2, False)
    assert count_passed("class Solution:\n    def pairs(self, x): return []", tests, SETTINGS) == (0, False)


@pytest.mark.parametrize(("row", "message"), [
    ({"id": 1}, "no known form.*\\['id'\\]"),
    ({**ROW, "canonical_solution": "    return 1 / (x - 3)\n"}, "HumanEval/0: the canonical solution fails.*ZeroDivisionError"),
    ({**MBPP, "test_list": []}, "test_list is empty"),
    ({**MBPP, "code": "def other(): pass"}, "none of which the column code defines"),
    ({"question": "q", "inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
    ({"inputs": ["1"], "outputs": ["1"]}, "no question"),
    ({"prompt": "def f(:", "entry_point": "f", "test": ""}, "the column prompt is not Python"),
])  # fmt: skip
def test_bad_rows(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CodeRowError, match=message):
        code_problem(row, SETTINGS)


@functools.cache
def benchmark_rows() -> list[dict[str, Any]]:
    if "ANTISD_DATA" not in os.environ:
        pytest.skip("ANTISD_DATA is not set: no published benchmarks to read")
    folder = Path(os.environ["ANTISD_DATA"]) / "code"
    return [json.loads(line) for name in ("HumanEvalPlus", "MbppPlus") for line in gzip.open(folder / f"{name}.jsonl.gz")]


WRONG = """

def _wrong(real):
    def wrapped(*arguments, **keywords):
        value = real(*arguments, **keywords)
        return (not value) if isinstance(value, bool) else (value, "wrong")
    return wrapped

{name} = _wrong({name})
"""
ANYTHING_PASSES = {"Mbpp/164"}  # not in the newest release
"""EvalPlus accepts every answer there."""
NONE_IS_ASKED_FOR = {"check_str", "text_match_three", "text_starta_endb"}


def assert_solved_and_not_by_a_mutation(row: dict[str, Any], settings: SandboxSettings) -> None:
    task = row["task_id"]
    _, tests = code_problem(row, settings)
    solution = row["canonical_solution"] if task.startswith("Mbpp/") else row["prompt"] + row["canonical_solution"]
    verdict = grade_code(fenced(solution), tests, settings)
    assert (verdict.reward, verdict.outcome) == (1.0, "graded"), (task, verdict)
    name = row["entry_point"]
    opposite = f"{solution}\n_real = {name}\ndef {name}(*a): return not _real(*a) or None\n"
    mutation = opposite if name in NONE_IS_ASKED_FOR else solution + WRONG.format(name=name)
    wrong = grade_code(fenced(mutation), tests, settings)
    assert wrong.reward < 1.0 or task in ANYTHING_PASSES, (task, wrong)


SAMPLE = [f"HumanEval/{n}" for n in (0, 1, 5, 10, 22, 32, 38, 50, 70, 137, 160)]
SAMPLE += [f"Mbpp/{n}" for n in (2, 7, 124, 232, 252, 278, 446, 558, 580, 581, 616, 722, 750, 791)]
"""All special comparisons and most special forms of inputs among them."""


@pytest.mark.parametrize("task", SAMPLE)
def test_a_sample_of_published_solutions_passes_and_mutations_fail(task: str) -> None:
    (row,) = [row for row in benchmark_rows() if row["task_id"] == task]
    assert_solved_and_not_by_a_mutation(row, SandboxSettings(mode=SETTINGS.mode))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(6))
def test_all_published_solutions_pass_and_mutations_fail(part: int) -> None:
    rows = benchmark_rows()
    assert len(rows) == 164 + 378
    patient = SandboxSettings(mode=SETTINGS.mode, seconds=300.0, case_seconds=60.0)
    for row in rows[part::6]:
        assert_solved_and_not_by_a_mutation(row, patient)
