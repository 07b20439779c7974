"""pass@k against enumeration of all subsets, and the summary's keys and refusals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest

from megatron_antisd.evaluate import avg_at_k, pass_at_k, summarise


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


def test_summary_by_hand() -> None:
    correct = [[True, False, False, False], [True, True, False, True], [False] * 4]
    truncated = [[False] * 4, [False, False, True, False], [True, True, False, False]]
    lengths = [[1, 2, 3, 4], [10, 10, 10, 10], [5, 5, 5, 5]]
    assert summarise("aime", correct, truncated=truncated, response_lengths=lengths) == pytest.approx({
        "eval/aime/avg@4": 4 / 12,
        "eval/aime/pass@1": 4 / 12,
        "eval/aime/pass@2": (0.5 + 1 + 0) / 3,
        "eval/aime/pass@4": 2 / 3,
        "eval/aime/truncation_rate": 3 / 12,
        "eval/aime/response_length_mean": (10 + 40 + 20) / 12,
    })  # fmt: skip


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (30, [1, 2, 4, 8, 16, 30])])
def test_reported_ks(samples: int, ks: list[int]) -> None:
    table = [[1.0] * samples]
    metrics = summarise("b", table, truncated=table, response_lengths=table)
    assert [key.partition("pass@")[2] for key in metrics if "pass@" in key] == [str(k) for k in ks]
    assert f"eval/b/avg@{samples}" in metrics


def test_average_is_the_mean_of_pass_at_1() -> None:
    correct = [[True, False, True], [False, False, True]]
    assert avg_at_k(correct) == pytest.approx(sum(pass_at_k(3, sum(p), 1) for p in correct) / 2, abs=1e-15)


@pytest.mark.parametrize("correct", [[], [[]], [[True], [True, False]], [[None]], [[0.5]], [[float("nan")]]])
def test_missing_or_uneven_samples_are_refused(correct: list) -> None:
    with pytest.raises(ValueError, match="expected"):
        avg_at_k(correct)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="truncated"):
        summarise("b", [[True, True]], truncated=[[True]], response_lengths=[[1, 1]])
    with pytest.raises(ValueError, match="response_lengths"):
        summarise("b", [[True, True]], truncated=[[True, False]], response_lengths=[])
