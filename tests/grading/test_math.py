"""The math grader: extraction, equivalence, and small changes that must not pass."""

from __future__ import annotations

import threading
import time

import pytest

from megatron_antisd.grading.math import MAX_PARSED_CHARACTERS, equivalent, grade

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
    # the closing sentence of the Minerva prompt behind the last box, and only there
    (r"\boxed{255}. Final Answer: The final answer is $10,455$. I hope it is correct.", "10455", 1.0),
    (r"\boxed{255}. Final Answer: The final answer is $10,455$. I hope it is correct.", "255", 0.0),
    (r"The final answer is $5$. I hope it is correct. No: \boxed{3}", "3", 1.0),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5", 0.0),
    # within a box nothing is searched for
    (r"\boxed{def f(): return 5}", "5", 0.0),
    (r"\boxed{not 5 but 6 in the end}", "6", 0.0),
    (r"\boxed{\text{not } 5}", "5", 0.0),
    (r"\boxed{The answer is: 5}", "5", 1.0),
]

EQUAL = [
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), (r"\frac{2}{4}", r"\frac{1}{2}"), ("$1/2$", r"$\tfrac{1}{2}$"),
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("[0,1)", "[0, 1)"), (r"(-\infty, 3]", r"x \le 3"), (r"(1,2)\cup(3,4)", r"(1, 2) \cup (3, 4)"),
    (r"5\text{ cm}", "5"), (r"5\ \mathrm{m/s}", "5"), (r"90^\circ", "90"), (r"\$18", "18"), (r"10\%", "10"),
    ("x^2+2x+1", "(x+1)^2"), ("x = 5", "5"), ("5", "x = 5"), (r"\text{A}", "A"), (r"\textbf{(B)}", "B"),
    ("1,234,567", "1234567"), ("1000,99", "1000.99"), ("007", "7"), ("-0", "0"), ("+3", "3"),
    # multiple choice
    ("(A)", "A"), ("A.", r"\text{(A)}"), ("option A", "A"), (r"\text{Choice A}", "(A)"), (r"\textbf{(B)}\ 12", "B"), ("C) 7", "C"),
    # numbers
    ("1.6e-19", r"1.6 \times 10^{-19}"), (r"3\cdot10^8", "3e8"), ("10^4", "10000"), (r"1\frac{4}{5}", "9/5"), ("1 4/5", "1.8"),
    ("-1./3", r"-\frac13"), (r"23{,}000", "23000"), (r"1\,000", "1000"), ("€5", "5"), ("5 cm", "5"),
    ("237.5", r"237.5\%"), (r"0.5", r"50\%"), (r"50\%", "50"), ("3−2", "1"), ("2√3", r"\sqrt{12}"), ("90°", r"90^\circ"),
    # units, words, lists, matrices
    (r"5\text{ centimeters}", r"5\ \mathrm{cm}"), (r"15\text{ square cm}", r"15\mbox{ cm}^2"), ("EVEN", r"\text{even}"),
    (r"\text{H, E}", "E, H"), (r"3 - 2\sqrt{2}, 3 + 2\sqrt{2}", r"3 \pm 2\sqrt{2}"), (r"\left(3,\tfrac12\right)", "(3, 0.5)"),
    (r"\begin{bmatrix}1&2\\ 3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"), ("7:32", r"7 : 32"),
    (r"y = \sin x + 1", r"\sin x + 1 = y"), (r"\frac34.", "3/4"),
    (r"5\mathrm{i}", "5i"), (r"\mathrm{e}^2", "e^2"), (r"3 + 4\text{i}", "3+4i"), (r"\frac\pi 2", r"\frac{\pi}{2}"), (r"10\choose 3", "120"),
    (r"0.\overline{3}", r"\frac13"), (r"-1.2\overline{3}", r"-\frac{37}{30}"), (r"\varnothing", r"\emptyset"), (r"\langle 1,2\rangle", "(1,2)"),
    (r"\text{7:30 PM}", "7:30 PM"), (r"7:30\text{ p.m.}", r"7:30\text{ PM}"), ("0<x<1", "(0,1)"), ("(0,1)", "0<x<1"), (r"-2\le x\le 7", "[-2,7]"),
    ("x>3", r"(3,\infty)"), (r"(3,\infty)", "x>3"), (r"x\ge 0", r"[0,\infty)"), (r"[0,\infty)", r"x\ge0"), ("1,1,2", "2,1,1"),
    (r"5\text{ apples}", "5"), (r"5\text{ apple}", r"5\text{ apples}"), (r"5\text{ square feet}", r"5\text{ ft}^2"),
    (r"5\text{ mph}", r"5\text{ miles per hour}"),
    (r"5\text{ meters per second}", r"5\ \mathrm{m}\cdot\mathrm{s}^{-1}"), (r"30^\circ\text{C}", "30"), (r"\$5", r"5\text{ dollars}"), ("2+3=5", "5"),
    (r"y^{\prime}=2x", "y'=2x"), ("y' = 2x", "2x"), ("N(N+1)", "N^2+N"), (r"\frac{GM}{r}", r"\frac{MG}{r}"), (r"51\text{ (base 7)}", "51_7"),
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
    # what Math-Verify 0.9 takes for equal
    ("[1,2,3]", "(1,2,3)"), (r"\{3, 4\}", "(3, 4)"), ("(3,5]", "(3,5)"), ("1,1,2", "1,2"), ("1 2", "3"), ("2e-8", "1e-8"), ("0.0000001", "0.0000002"),
    ("52", "52_8"), ("52_9", "52_8"), (r"5\text{ km}", r"5\text{ cm}"), (r"15\text{ cm}^3", r"15\text{ cm}^2"), (r"5\%", "0.5"), (r"0.5\%", "0.5"),
    (r"\frac{d t}{d x}=k x-a", r"\frac{d x}{d t}=k x-a"), (r"\hbar \omega(v-1 / 2)", r"\hbar \omega(v+1 / 2)"), (r"\text{CBAD}", r"\text{ABCD}"),
    ("3 + 2", "3, 2"), ("5, 977", "5"), (r"3 + 2\sqrt{2}", r"3 \pm 2\sqrt{2}"), ("(A) or (B)", "A"), ("(B)", "A"), ("A, B", "A"),
    (r"\infty", "5"), (r"1/0", "5"), (r"m \sin \theta(t)=f(t) \cos \theta(t)", r"-m \sin \theta(t)=f(t) \cos \theta(t)"),
    # letters: case, primes, words of capitals
    ("n", "N"), ("e", "E"), (r"\Gamma", r"\gamma"), (r"\Delta", r"\delta"), ("X_1", "x_1"), (r"\frac{GM}{r}", r"\frac{Gm}{r}"), ("a+B", "A+b"),
    (r"\frac{T}{t}", "1"), ("(M, m)", "(m, M)"), ("(A, B)", "(a, b)"), ("f'(x)", "f(x)"), ("y'=2x", "y=2x"), ("y''", "y'"), ("5'", "5"),
    ("IV", "VI"), ("AB", "BA"),
    # words behind a number that change it
    (r"3+4\mathrm{i}", "7"), (r"5\text{i}", "5"), (r"5\mathrm{x}", "5"), (r"5\text{ million}", "5"), (r"3\text{ dozen}", "3"),
    (r"5\text{ tenths}", "5"),
    (r"5\text{ halves}", "5"), (r"5\text{ squared}", "5"), (r"5\text{ factorial}", "5"),
    (r"5\text{ or 7 or 9}", "5"), (r"5\text{ is wrong}", "5"),
    (r"5\text{ or more}", "5"), (r"5\text{ at most}", "5"), (r"\text{at least } 5", "5"),
    (r"10\text{ choose 3}", "10"), (r"5\text{ remainder } 2", "5"),
    (r"5\text{ (mod 7)}", r"5\text{ (mod 11)}"), (r"51\text{ (base 7)}", r"51\text{ (base 8)}"), (r"120\text{ (base six)}", "120"),
    (r"30^\circ\text{ N}", r"30^\circ\text{ S}"), (r"5\text{ wins}", r"5\text{ losses}"), (r"x=3\text{ (minimum)}", r"x=3\text{ (maximum)}"),
    (r"7:30\text{ PM}", r"7:30\text{ AM}"),
    # units and currencies
    (r"5\text{ mm}", r"5\text{ nm}"), (r"5\text{ Hz}", r"5\text{ MHz}"), (r"5\text{ eV}", r"5\text{ keV}"), (r"5\text{ K}", r"5\text{ mK}"),
    (r"5\text{ mW}", r"5\text{ MW}"), (r"5\text{ m/s}", r"5\text{ km/h}"), (r"5\text{ m/s}^2", r"5\text{ m/s}"),
    (r"30^\circ\text{F}", r"30^\circ\text{C}"),
    (r"\$5", r"5\text{ euros}"), (r"5\text{ cents}", r"\$5"), ("€5", r"\$5"), (r"5\text{ kilometers per hour}", r"5\text{ meters per second}"),
    # other bases, chains of equations, lists, dates, slashes
    ("-21_3", "-21"), ("0.12_3", "0.12_4"), ("4=5", "5"), ("1=2=5", "5"), ("0=0", "1=1"), ("1,1,2", "1,2,2"), ("1,1,2,2", "1,1,1,2"),
    (r"1,2,\ldots", "1,2"), ("2024-01-05", "2018"), ("1/2x", r"\frac{1}{2x}"), (r"1/2\pi", r"\frac{1}{2\pi}"),
    (r"0\le x<1", "(0,1)"), ("0<x<1", "[0,1]"), ("x>3", r"[3,\infty)"), ("x<3", r"(3,\infty)"), (r"0.\overline{3}", "0.3"),
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


HOSTILE = {
    "a megabyte of digits": "7" * 1_000_000, "a megabyte of letters": "x" * 1_000_000, "a megabyte of words": "answer is 5 " * 90_000,
    "a megabyte of dots": "." * 1_000_000, "100,000 open braces": "{" * 100_000, "nested braces": "{" * 100_000 + "5" + "}" * 100_000,
    "nested roots": r"\sqrt{" * 50_000 + "5" + "}" * 50_000,
    "nested brackets": "(" * 400 + "5" + ")" * 400, "deep but short": "{" * 40 + "5" + "}" * 40,
    "zero bytes": "\x00" * 1000 + "6", "surrogates": "\ud800", "right to left": "\u202e5", "emoji": "5 🙂🙂", "backslashes": "\\" * 100_000,
    "dollars": "$" * 100_000, "code": "import os\nos._exit(3)\nprint(5)", "unclosed": r"\frac{1}{",
    "no command": r"\nosuchcommand{5}", "division": r"\frac{5}{0}",
    "undefined": r"0^{-1}", "markup": "<b>6</b>", "formats": "%s{}{0}", "newlines": "\n" * 100_000 + "6",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_a_verdict_in_linear_time(name: str) -> None:
    """All are bounded before the parser; a second is ten times what the slowest takes on a quiet machine."""
    start = time.process_time()
    assert grade(rf"\boxed{{{HOSTILE[name]}}}", "5") == 0.0
    assert grade(HOSTILE[name], "5") == 0.0
    equivalent(HOSTILE[name], "5")  # a sentence of these may well end in 5
    assert equivalent("5", HOSTILE[name]) is False
    assert time.process_time() - start < 6


@pytest.mark.parametrize("unit", [r"\boxed{1}", r"\boxed{1}, ", r"\text{a}", "I hope it is correct", "inal answer is", "</think>", "$", "{}"])
def test_long_responses_take_linear_time(unit: str) -> None:
    start = time.process_time()
    grade(unit * 30_000 + r" \boxed{5}", "5")
    assert time.process_time() - start < 3


def test_nested_boxes_need_no_copies() -> None:
    """Each of 20,000 boxes inside the other, all complete: their contents together would be 3 GB."""
    assert grade(r"\boxed{" * 20_000 + "5" + "}" * 20_000, "5") == 1.0


def test_a_long_answer_is_right_only_as_the_gold_itself() -> None:
    long = " + ".join(f"x_{{{place}}}" for place in range(400))
    assert len(long) > MAX_PARSED_CHARACTERS
    assert grade(rf"\boxed{{{long}}}", long) == 1.0
    assert grade(rf"\boxed{{{long} + 0}}", long) == 0.0


def test_a_sentence_is_searched_by_equivalent_only() -> None:
    assert equivalent("so we find that the number is 12.", "12") is True
    assert equivalent("so we find that the number is 12.", "13") is False
    assert equivalent("word " * 5000 + "so we find that the number is 12.", "12") is True  # only its end is read
    assert grade(r"\boxed{so we find that the number is 12.}", "12") == 0.0


def test_works_in_a_thread() -> None:
    """Math-Verify's own time-outs raise outside the main thread."""
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(grade(r"\boxed{\frac{3}{6}}", "0.5")))
    thread.start()
    thread.join(30)
    assert rewards == [1.0]
