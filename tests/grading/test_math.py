"""The math grader: extraction, equivalence, and small changes that must not pass."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from megatron_antisd.grading.math import equivalent, grade

GRADED = [
    # response, answer, reward
    (r"so \boxed{4}", "4", 1.0),
    (r"\boxed{ 4 }", "$4$", 1.0),
    (r"\boxed{4}", r"\boxed{4}", 1.0),
    (r"\boxed{4}", r"The answer is $\boxed{4}$.", 1.0),
    ("the answer is 4", "4", 0.0),
    ("", "4", 0.0),
    (r"\boxed{}", "4", 0.0),
    (r"\boxed{4", "4", 0.0),
    (r"\boxed{4}", "", 0.0),
    # nested braces, escaped braces
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt3}{2}", 1.0),
    (r"\boxed{\frac{1}{\frac{2}{3}}}", "3/2", 1.0),
    (r"\boxed{\left\{1, 2\right\}}", r"\{2, 1\}", 1.0),
    (r"\boxed{\boxed{7}}", "7", 1.0),
    (r"{ stray \boxed{x^{2}} } }", "x^2", 1.0),
    # several boxes: the last complete one
    (r"\boxed{3}, no: it is \boxed{5}", "5", 1.0),
    (r"\boxed{5}, no: it is \boxed{3}", "5", 0.0),
    (r"\boxed{5} and I was cut at \boxed{3", "5", 1.0),
    # several boxes that are one answer
    (r"$\boxed{2} \quad \text{and} \quad \boxed{6}$", "2, 6", 1.0),
    (r"$\boxed{2} \quad \text{and} \quad \boxed{7}$", "2, 6", 0.0),
    (r"\boxed{2} is a first try, later I found \boxed{6}", "2, 6", 0.0),
    # thinking
    (r"<think>\boxed{5}</think> It is \boxed{3}", "3", 1.0),
    (r"<think>It is \boxed{3}</think> I do not know", "3", 0.0),
    (r"<think>a</think>\boxed{1}<think>b</think>\boxed{2}", "2", 1.0),
    (r"<think>never closed \boxed{3}", "3", 1.0),
    # several values are not one of them
    (r"\boxed{3, 5}", "5", 0.0),
    (r"\boxed{3 \text{ or } 5}", "5", 0.0),
    (r"\boxed{3}", "3, 5", 0.0),
]

EQUAL = [
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"\frac{2}{4}", r"\frac{1}{2}"), ("$1/2$", r"$\tfrac{1}{2}$"),
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("[0,1)", "[0, 1)"), (r"(-\infty, 3]", r"x \le 3"), (r"(1,2)\cup(3,4)", r"(1, 2) \cup (3, 4)"),
    (r"5\text{ cm}", "5"), (r"5\ \mathrm{m/s}", "5"), (r"90^\circ", "90"), (r"\$18", "18"), (r"10\%", "10"),
    ("x^2+2x+1", "(x+1)^2"), ("x = 5", "5"), ("5", "x = 5"), (r"\text{A}", "A"), (r"\textbf{(B)}", "B"),
    ("1,234,567", "1234567"), ("1000,99", "1000.99"), ("007", "7"), ("-0", "0"), ("+3", "3"),
    (r"\binom{5}{2}", "10"), (r"\log_2 8", "3"), ("0.333333", "1/3"), ("2^{10}", "1024"), (r"5x-7y=2", "7y-5x=-2"),
]  # fmt: skip

UNEQUAL = [
    # sign
    ("-5", "5"), (r"-\frac{1}{2}", r"\frac{1}{2}"), ("2-3i", "2+3i"), (r"\infty", r"-\infty"), ("x-1", "x+1"),
    # one digit
    ("123456788", "123456789"), ("12345678901234567890123456788", "12345678901234567890123456789"),
    (r"\frac{22}{7}", r"\frac{22}{9}"), ("0.333", "1/3"), ("2^{100}+1", "2^{100}"), ("9" * 6000, "9" * 5999 + "8"), ("1 2", "12"),
    (r"2\sqrt{3}", r"3\sqrt{2}"), ("[0,9)", "[0,1)"), ("3.14", r"\pi"),
    # variable
    ("x^2+1", "y^2+1"), ("x = 5", "y = 5"), ("n", "m"), ("B", "A"), (r"\text{odd}", r"\text{even}"),
    # order, brackets, relation
    ("(2,1)", "(1,2)"), ("(0,1]", "[0,1)"), ("(1,2)", "(1,2,3)"), ("x < 3", r"x \le 3"), ("x > 3", "x < 3"),
    (r"\{1,2\}", r"\{1,3\}"), ("32, 349", "32349"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"), ("4:3", "3:4"),
    # no answer at all
    ("", "5"), ("5", ""), ("$$", "5"), ("!!!", "5"), (r"\frac{", "5"), ("}{", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer", "reward"), GRADED)
def test_grade(response: str, answer: str, reward: float) -> None:
    got = grade(response, answer)
    assert got == reward
    assert isinstance(got, float)


@pytest.mark.parametrize(("prediction", "gold"), EQUAL)
def test_equal(prediction: str, gold: str) -> None:
    assert equivalent(prediction, gold) is True
    assert grade(rf"Thus $\boxed{{{prediction.strip('$')}}}$.", gold) == 1.0


@pytest.mark.parametrize(("prediction", "gold"), UNEQUAL)
def test_unequal(prediction: str, gold: str) -> None:
    assert equivalent(prediction, gold) is False
    assert grade(rf"Thus $\boxed{{{prediction.strip('$')}}}$.", gold) == 0.0


def test_many_unclosed_boxes_take_linear_time() -> None:
    start = time.monotonic()
    assert grade(r"\boxed{" * 50_000, "5") == 0.0
    assert time.monotonic() - start < 2  # about 0.05 s; a scan from every box would take minutes


def test_works_in_a_thread() -> None:
    """Math-Verify's own time-outs raise outside the main thread."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(grade(r"\boxed{\frac{3}{6}}", "0.5")))
    thread.start()
    thread.join(30)
    assert rewards == [1.0]


@pytest.mark.skipif("ANTISD_DATA" not in os.environ, reason="needs ANTISD_DATA: the folder with goldens/grader_cases.dev.jsonl")
def test_agrees_with_the_public_cases() -> None:
    lines = (Path(os.environ["ANTISD_DATA"]) / "goldens" / "grader_cases.dev.jsonl").read_text().splitlines()
    cases = [case for case in map(json.loads, lines) if case["tier"] == "core" and not case["suspect_label"]]
    wrong = []
    for case in cases:
        prediction, gold = case["prediction"], case["gold"]
        got = grade(prediction, gold) == 1.0 if r"\boxed" in prediction else equivalent(prediction, gold)
        if got != case["expected_equal"]:
            wrong.append(case["id"])
    # Two responses state another answer after their last box, or break the box's braces: not an answer here.
    assert len(cases) >= 100
    assert len(wrong) <= 2, wrong
