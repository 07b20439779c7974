"""How often the math grader is wrong: on perturbed golds, on golds written another way, and on the public cases."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
from grading.perturbations import GOLDS, NEGATIVES, POSITIVES, Kind, perturbed

from megatron_antisd.grading.exact import exact_verdict
from megatron_antisd.grading.math import equivalent, grade, parsed_equal
from megatron_antisd.grading.notation import normalised

needs_data = pytest.mark.skipif("ANTISD_DATA" not in os.environ, reason="needs ANTISD_DATA: the folder with goldens/ and eval/")

CONVENTIONS = {
    "gc-a2bdc6d7ef25": "[5.0] is a list of one, not the number",
    "gc-b923597cc91e": "variables have names: f(x) is not f(y)",
    "gc-ba5f99c297f9": "0.33 is not 1/3; six decimals are asked for",
    "gc-41cdb5dde2f0": "2/4 equals 1/2; whether it is reduced is no part of equality",
    "gc-7ccd5f96b5b1": "a bare list is a set of solutions: its order means nothing",
    "gc-856f0f9fec14": "a reference with three boxes means all three",
    "gc-11950f9704c1": "a reference with three boxes means all three",
}
"""Cases of tier convention that are decided otherwise here, each with the reason. docs/grading.md holds the same list."""


def _graded(prediction: str, gold: str) -> bool:
    return grade(rf"Thus $\boxed{{{prediction.strip('$')}}}$.", gold) == 1.0


def _wrong(golds: tuple[str, ...] | list[str], kinds: dict[str, Kind], *, equal: bool) -> tuple[Counter[str], list[tuple[str, str, str]]]:
    """(how many cases of each kind, those that were decided wrongly)."""
    cases = perturbed(golds, kinds)
    return Counter(kind for kind, _, _ in cases), [case for case in cases if _graded(case[1], case[2]) != equal]


def test_no_perturbed_answer_passes() -> None:
    counts, wrong = _wrong(GOLDS, NEGATIVES, equal=False)
    assert not wrong
    assert set(counts) == set(NEGATIVES), "a kind that no gold of the set shows"
    assert counts.total() > 250


def test_the_answer_written_another_way_passes() -> None:
    counts, wrong = _wrong(GOLDS, POSITIVES, equal=True)
    assert not wrong
    assert set(counts) == set(POSITIVES)


def _benchmark_golds() -> list[str]:
    files = ("aime2024", "aime2025", "aime2026", "hmmt_feb2025", "math500", "minerva_math")
    rows = [line for name in files for line in (Path(os.environ["ANTISD_DATA"]) / "eval" / f"{name}.jsonl").read_text().splitlines()]
    return list(dict.fromkeys(str(json.loads(row)["answer"]) for row in rows))


@needs_data
@pytest.mark.slow
def test_false_positives_on_the_benchmarks() -> None:
    """Every second of some 600 golds, 2,700 wrong answers. At most 1 in 1,000 passes; measured on all 600: none of 5,510."""
    counts, wrong = _wrong(_benchmark_golds()[::2], NEGATIVES, equal=False)
    assert counts.total() > 1500
    assert len(wrong) <= counts.total() / 1000, wrong


@needs_data
@pytest.mark.slow
def test_false_negatives_on_the_benchmarks() -> None:
    """4,000 right answers. At most 2 in 1,000 fail; measured: 2, sums of energies `E_{1}`, which the parser takes for Euler's number."""
    counts, wrong = _wrong(_benchmark_golds(), POSITIVES, equal=True)
    assert counts.total() > 3000
    assert len(wrong) <= counts.total() / 500, wrong


NUMBERS = ("0", "5", "-5", "17", "0.5", "-0.5", ".5", "12.50", "1/2", r"\frac{1}{2}", r"-\frac{1}{2}", r"\frac{5}{10}", "0.333333", "1/3", "0.333",
           "12345.678", r"1\frac{1}{2}", "1.5", "3/2", "100", r"10^2", r"1 \times 10^{2}", r"50\%", "50", r"5^\circ", "1,000", "1000", "(5)",
           "B", "C", r"\text{even}", r"\text{odd}", "Even")  # fmt: skip


def _same_kind(prediction: str, gold: str) -> bool:
    """Both sides of a percent sign are decided by rule, not by value, and the parser does so for integers only."""
    return ("%" in prediction) == ("%" in gold)


def test_fast_paths_never_disagree_with_the_parser() -> None:
    pairs = [(normalised(one), normalised(other)) for one in NUMBERS for other in NUMBERS if _same_kind(one, other)]
    pairs += [(normalised(text), normalised(gold)) for _, text, gold in perturbed(GOLDS, NEGATIVES | POSITIVES) if _same_kind(text, gold)]
    fast = [(one, other, verdict) for one, other in pairs if (verdict := exact_verdict(one, other)) is not None]
    assert len(fast) > 700
    assert Counter(verdict for _, _, verdict in fast)[True] > 180
    # What the parser rounds to 6 decimals is decided exactly: these are the only pairs of numbers on which the two may differ.
    comparable = [case for case in fast if not re.search(r"10\^\{-", case[0] + case[1])]
    assert len(comparable) > 650
    assert [case for case in comparable if parsed_equal(case[0], case[1]) != case[2]] == []


def test_numbers_are_compared_exactly() -> None:
    assert exact_verdict("12345678901234567890123", "12345678901234567890124") is False
    assert exact_verdict("1.00000001", "1.00000002") is False
    assert exact_verdict("0.3333333333", "0.333333") is True  # rounded at 6 decimals
    assert exact_verdict("0.000001", r"\frac{1}{1500000}") is False  # the same at 6 decimals, half as much again
    assert exact_verdict("2e5", "2e5") is None  # not normalised
    assert exact_verdict(r"1 \times 10^{99999999}", "1") is None  # left to the parser, which the pool can end


def _public_cases() -> list[dict]:
    lines = (Path(os.environ["ANTISD_DATA"]) / "goldens" / "grader_cases.dev.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@needs_data
def test_public_cases() -> None:
    cases = _public_cases()
    wrong: dict[str, str] = {}
    for case in cases:
        prediction, gold = case["prediction"], case["gold"]
        got = grade(prediction, gold) == 1.0 if r"\boxed" in prediction else equivalent(prediction, gold)
        if got != case["expected_equal"]:
            wrong[case["id"]] = case["tier"] + (", suspect" if case["suspect_label"] else "")
    assert [name for name, tier in wrong.items() if tier == "core"] == []
    assert sum(case["tier"] == "core" for case in cases) >= 180
    assert {name for name, tier in wrong.items() if tier == "convention"} == set(CONVENTIONS)
