"""Comparisons of methods against numbers worked out by hand, and intervals against published tables and simulation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from reporting.synthetic_runs import write_run

from megatron_antisd.reporting import compare_runs, comparison_markdown, write_comparison
from megatron_antisd.reporting.commands import main
from megatron_antisd.reporting.intervals import estimate, t_quantile

GRPO = {0: 0.1, 10: 0.2, 20: 0.3, 30: 0.6, 40: 0.5}
ANTISD = {0: 0.1, 10: 0.6, 20: 0.7, 30: 0.7, 40: 0.7}


def shifted(curve: dict[int, float], amount: float) -> dict[int, float]:
    return {step: value + amount for step, value in curve.items()}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds of grpo and antisd on one base, that differ by -0.05, 0, +0.05; antisd is ahead by seed-dependent amounts at 40."""
    made = []
    for seed, shift in enumerate((-0.05, 0.0, 0.05)):
        made.append(write_run(tmp_path / f"grpo-{seed}", method="grpo", seed=seed, accuracy=shifted(GRPO, shift)))
        made.append(
            write_run(tmp_path / f"antisd-{seed}", seed=seed, accuracy=shifted(ANTISD, shift) | {40: 0.7 + shift + (seed - 1) / 10})
        )
    return made


def test_t_quantile_against_the_published_table() -> None:
    # Two-sided 95 % and 99 %, three decimals, as printed in statistics tables.
    for probability, degrees, expected in ((0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 5, 2.571), (0.975, 30, 2.042), (0.995, 3, 5.841)):
        assert t_quantile(probability, degrees) == pytest.approx(expected, abs=5e-4)


def test_interval_over_seeds_by_hand() -> None:
    value = estimate({"base": [0.1, 0.2, 0.6]})  # mean 0.3, deviation sqrt(0.07), half width 4.3027 * sqrt(0.07 / 3)
    assert (value.mean, value.kind, value.runs) == (pytest.approx(0.3), "t", 3)
    assert value.high - value.mean == pytest.approx(4.302653 * (0.07 / 3) ** 0.5, rel=1e-6)
    single = estimate({"base": [0.4]})
    assert (single.mean, single.low, single.high, single.kind) == (0.4, None, None, "single")
    with pytest.raises(ValueError, match="at least one value"):
        estimate({"base": []})


def test_interval_over_bases_is_a_two_stage_bootstrap() -> None:
    groups = {"a": [0.1, 0.2, 0.3], "b": [0.5, 0.7], "c": [0.35]}
    value = estimate(groups)
    assert value.mean == pytest.approx((0.2 + 0.6 + 0.35) / 3)  # bases weigh the same whatever their number of seeds
    random, means = np.random.default_rng(7), []
    for _ in range(4000):
        bases = random.choice(["a", "b", "c"], size=3)
        means.append(np.mean([np.mean(random.choice(groups[base], size=len(groups[base]))) for base in bases]))
    low, high = np.quantile(means, [0.025, 0.975])
    assert value.low == pytest.approx(low, abs=0.02) and value.high == pytest.approx(high, abs=0.02)  # two simulations of one quantity
    assert estimate(groups) == value


def test_interval_covers_at_its_level() -> None:
    random = np.random.default_rng(0)
    covered = [(e.low <= 0.0 <= e.high) for e in (estimate({"b": random.normal(size=4).tolist()}) for _ in range(400))]
    assert 0.92 <= np.mean(covered) <= 0.98  # 0.95 with a standard error of 0.011


def test_comparison_by_hand(runs: list[Path]) -> None:
    comparison = compare_runs(runs, thresholds=(0.25, 0.65))
    grpo, antisd = comparison.results
    assert [r.method for r in comparison.results] == ["grpo", "antisd"] and {r.scope for r in comparison.results} == {"base-0"}
    assert grpo.accuracy[30].mean == pytest.approx(0.6) and grpo.accuracy[30].runs == 3
    assert grpo.accuracy[30].high == pytest.approx(0.6 + 4.302653 * 0.05 / 3**0.5, abs=1e-6)
    assert grpo.best_step == 30 and antisd.best_step == 20
    assert grpo.first_step == {0.25: 20, 0.65: None} and antisd.first_step == {0.25: 10, 0.65: 20}
    assert antisd.speedup == pytest.approx(3.0)  # grpo is best at 30 with 0.6, which antisd reaches at 10
    assert grpo.speedup == pytest.approx(1.0) and grpo.difference == {}
    # Paired by seed: at step 10 every pair differs by 0.4 exactly; at 40 by 0.1, 0.2, 0.3.
    assert (antisd.difference[10].mean, antisd.difference[10].high) == (pytest.approx(0.4), pytest.approx(0.4))
    assert antisd.difference[40].mean == pytest.approx(0.2)
    assert antisd.difference[40].high == pytest.approx(0.2 + 4.302653 * 0.1 / 3**0.5, abs=1e-6)


def test_files_of_a_comparison(runs: list[Path], tmp_path: Path) -> None:
    comparison = compare_runs(runs)
    write_comparison(comparison, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text == comparison_markdown(comparison)
    assert "| antisd | 3 | 10.0 [-2.4, 22.4] | 60.0 [47.6, 72.4] |" in text and "Student's t over seeds" in text
    assert "| antisd | 60.0 @30" not in text and "| grpo | 60.0 @30 | 20 | 30 | never | 1.0x |" in text
    assert "+40.0 [+40.0, +40.0]" in text
    assert "Unfinished" not in text
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 + 5 + 5  # two methods and one difference, five steps each
    assert {r["quantity"] for r in rows} == {"accuracy", "minus grpo"}
    saved = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert saved["results"][1]["speedup"] == pytest.approx(3.0) and len(saved["runs"]) == 6


def test_several_bases(tmp_path: Path) -> None:
    made = []
    for base, level in (("models/a/hf", 0.0), ("models/b/hf", 0.2)):
        for seed in (0, 1):
            name = f"{base[7]}-{seed}"
            made.append(write_run(tmp_path / f"grpo-{name}", method="grpo", seed=seed, base=base, accuracy=shifted(GRPO, level)))
            if base == "models/a/hf":
                made.append(write_run(tmp_path / f"sd-{name}", method="sd", seed=seed, base=base, accuracy=GRPO))
    comparison = compare_runs(made)
    assert [(r.scope, r.method) for r in comparison.results] == [("a/hf", "grpo"), ("a/hf", "sd"), ("b/hf", "grpo"), ("all bases", "grpo")]
    together = comparison.results[-1].accuracy[30]
    assert together.mean == pytest.approx(0.7) and together.kind == "bootstrap" and together.runs == 4
    assert (together.low, together.high) == (pytest.approx(0.6), pytest.approx(0.8))


def test_unfinished_runs_are_named_and_shorten_the_mean(runs: list[Path], tmp_path: Path) -> None:
    short = write_run(tmp_path / "short", method="sd", accuracy={0: 0.1, 10: 0.1})
    path = short / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-20]))
    comparison = compare_runs([*runs, short])
    assert list(comparison.results[-1].accuracy) == [0, 10]
    assert comparison.results[-1].accuracy[0].kind == "single" and comparison.results[-1].speedup is None
    text = comparison_markdown(comparison)
    assert f"Unfinished runs (steps done): {short} (20 of 40)" in text
    assert "| sd | 1 | 10.0 | 10.0 | - | - | - |" in text and "none for a single run" in text


def test_refusals(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = write_run(tmp_path / "again", method="grpo", seed=0, accuracy=GRPO)
    with pytest.raises(ValueError, match="grpo-0.*again.*both grpo.*seed 0"):
        compare_runs([*runs, again])
    blind = write_run(tmp_path / "blind", method="sd", accuracy={}, steps=2)
    with pytest.raises(ValueError, match="no evaluations to compare|was evaluated on"):
        compare_runs([blind])
    with pytest.raises(ValueError, match="name one benchmark"):
        compare_runs([*runs, blind])
    assert main(["compare", str(runs[0]), str(runs[0])]) == 1
    assert "counting one twice" in capsys.readouterr().err


def test_compare_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs), "--output", str(tmp_path / "out"), "--thresholds", "0.3"]) == 0
    assert "# Comparison of 6 runs" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"comparison.md", "comparison.json", "comparison.csv", "comparison.png"}
