"""pass@k against enumeration of all subsets; majority votes; intervals against a known population; the summary's keys and refusals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from megatron_antisd.evaluate import pass_at_k
from megatron_antisd.evaluation.statistics import GradedSample, interval, majority_at_k, summarise


def enumerated(n: int, c: int, k: int) -> Fraction:
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    return Fraction(sum(any(subset) for subset in subsets), len(subsets))


def test_pass_at_k_equals_enumeration() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                # At most 8 factors in double precision: 1e-14 is far above their rounding, far below one subset's weight.
                assert pass_at_k(n, c, k) == pytest.approx(float(enumerated(n, c, k)), abs=1e-14), (n, c, k)


def test_pass_at_k_is_stable_for_many_samples() -> None:
    n, c, k = 20_000, 7, 4_096
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, -2), (0, 0, 1), (-3, 0, 1), (-3, -3, -3)])
def test_pass_at_k_refuses_the_impossible(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize("arguments", [(4.0, 1, 1), (4, True, 1), (4, 1, 2.5), (4, None, 1)])
def test_pass_at_k_refuses_what_is_no_integer(arguments: tuple) -> None:
    with pytest.raises(TypeError, match="integer"):
        pass_at_k(*arguments)


def sample(correct: bool, *, truncated: bool = False, tokens: int = 10, answer: str | None = "x") -> GradedSample:
    return GradedSample(correct=correct, truncated=truncated, tokens=tokens, answer=answer)


def problem(*correct: bool, **fields: object) -> list[GradedSample]:
    return [sample(c, **fields) for c in correct]


def test_summary_by_hand() -> None:
    problems = [problem(True, False, False, False, tokens=4), problem(True, True, False, True, tokens=10), problem(*[False] * 4, truncated=True)]
    found = summarise("aime", problems)
    expected = {
        "avg@4": 4 / 12, "pass@1": 4 / 12, "pass@2": (0.5 + 1 + 0) / 3, "pass@3": (0.75 + 1 + 0) / 3, "pass@4": 2 / 3, "truncation_rate": 4 / 12,
        "response_length_mean": 8, "majority@4": 1 / 3}
    intervals = {"low@4", "high@4", *(f"pass_{end}@{j}" for end in ("low", "high") for j in range(1, 5))}
    assert set(found) == {f"eval/aime/{key}" for key in {*expected, *intervals}}
    assert {key: found[f"eval/aime/{key}"] for key in expected} == pytest.approx(expected)
    for point, low, high in [("avg@4", "low@4", "high@4"), *((f"pass@{j}", f"pass_low@{j}", f"pass_high@{j}") for j in range(1, 5))]:
        assert 0 <= found[f"eval/aime/{low}"] <= found[f"eval/aime/{point}"] <= found[f"eval/aime/{high}"] <= 1


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """400 benchmarks of 40 problems from a known population; a percentile bootstrap of 40 Bernoulli means is a little narrow."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = interval(random.beta(2, 3, size=(40, 1)))
        covered += bool(low[0] <= 0.4 <= high[0])
    assert 0.90 <= covered / 400 <= 0.98


def test_interval_is_the_same_each_time_and_narrows_with_problems() -> None:
    random = np.random.default_rng(2)
    values = random.random((400, 1))
    assert interval(values) == interval(values)
    widths = [float((high - low)[0]) for low, high in (interval(values[:25]), interval(values))]
    assert widths[1] < 0.35 * widths[0]  # a sixteenth of the problems: four times as wide


def test_one_problem_has_no_interval() -> None:
    assert not [key for key in summarise("b", [problem(True, False)]) if "low" in key or "high" in key]


@pytest.mark.parametrize(("rows", "expected"), [
    ([(True, "1"), (True, "1.0"), (False, "2")], 1.0),  # right answers are one, however written
    ([(True, "1"), (False, "2"), (False, " 2 ")], 0.0),
    ([(True, "1"), (False, "2")], 0.5),  # a tie
    ([(True, "1"), (False, None), (False, None)], 1.0),  # no answer, no vote
    ([(False, None), (False, None)], 0.0),
    ([(True, None), (False, "2"), (False, "3")], 1 / 3),
])
def test_majority(rows: list[tuple[bool, str | None]], expected: float) -> None:
    assert majority_at_k([sample(correct, answer=answer) for correct, answer in rows]) == pytest.approx(expected)


def test_majority_is_absent_where_nothing_names_an_answer() -> None:
    assert "eval/code/majority@2" not in summarise("code", [problem(True, False, answer=None)] * 2)
    assert "eval/math/majority@2" in summarise("math", [problem(True, False, answer=None), problem(True, False)])


@pytest.mark.parametrize("problems", [[], [[]], [problem(True), problem(True, False)]])
def test_missing_or_uneven_samples_are_refused(problems: list) -> None:
    with pytest.raises(ValueError, match="expected problems with equally many samples"):
        summarise("b", problems)
