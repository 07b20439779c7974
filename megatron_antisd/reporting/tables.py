"""A comparison as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_antisd.reporting.compare import Comparison, MethodResult
from megatron_antisd.reporting.intervals import Estimate

INTERVALS = {
    "t": "Student's t over seeds",
    "bootstrap": "bootstrap over base models and their seeds (rough with two or three base models)",
    "single": "none for a single run",
}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows))


def comparison_markdown(comparison: Comparison) -> str:
    """The whole report, scopes one after the other, and the list of runs."""
    parts = [
        f"# Comparison of {len(comparison.runs)} runs",
        f"Accuracy in percent on {comparison.benchmark}; a mean over runs with its 95 % interval: {_interval_note(comparison)}.",
    ]
    for scope in dict.fromkeys(result.scope for result in comparison.results):
        results = [result for result in comparison.results if result.scope == scope]
        parts += [f"## {scope}", _accuracy_table(results)]
        if any(result.difference for result in results):
            parts += [f"Minus {comparison.baseline}, in points, over pairs of the same base model and seed:", _difference_table(results)]
        parts += [_step_text(comparison), _step_table(comparison, results)]
    return "\n\n".join([*parts, "## Runs", _runs_table(comparison), *unfinished(comparison)]) + "\n"


def write_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Write comparison.md, comparison.json (everything) and comparison.csv (one row per scope, method, quantity and step)."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"comparison.{end}" for end in ("md", "json", "csv")]
    paths[0].write_text(comparison_markdown(comparison))
    paths[1].write_text(json.dumps(dataclasses.asdict(comparison), indent=1, allow_nan=False) + "\n")
    with paths[2].open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=("scope", "method", "quantity", "step", "mean", "low", "high", "runs", "kind"))
        writer.writeheader()
        writer.writerows(_csv_rows(comparison))
    return paths


def _csv_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for result in comparison.results:
        for quantity, table in (("accuracy", result.accuracy), (f"minus {comparison.baseline}", result.difference)):
            for step, value in table.items():
                yield {"scope": result.scope, "method": result.method, "quantity": quantity, "step": step, **dataclasses.asdict(value)}


def _interval_note(comparison: Comparison) -> str:
    kinds = {value.kind for result in comparison.results for value in result.accuracy.values()}
    return "; ".join(text for kind, text in INTERVALS.items() if kind in kinds)


def _steps(results: Sequence[MethodResult]) -> list[int]:
    return sorted({step for result in results for step in result.accuracy})


def _accuracy_table(results: Sequence[MethodResult]) -> str:
    steps = _steps(results)
    rows = [[result.method, str(result.runs), *(percent(result.accuracy.get(step)) for step in steps)] for result in results]
    return markdown_table(["method", "runs", *(f"step {step}" for step in steps)], rows)


def _difference_table(results: Sequence[MethodResult]) -> str:
    steps = _steps(results)
    rows = [
        [
            result.method,
            str(next(iter(result.difference.values())).runs),
            *(percent(result.difference.get(step), "+.1f") for step in steps),
        ]
        for result in results
        if result.difference
    ]
    return markdown_table(["method", "pairs", *(f"step {step}" for step in steps)], rows)


def _step_text(comparison: Comparison) -> str:
    return (
        "First evaluated step at which the mean accuracy reaches a threshold, and the speed-up (the step at which "
        f"{comparison.baseline} is best / the first step at which the method reaches that accuracy):"
    )


def _step_table(comparison: Comparison, results: Sequence[MethodResult]) -> str:
    rows = [
        [
            result.method,
            f"{100 * result.accuracy[result.best_step].mean:.1f} @{result.best_step}",
            *("never" if result.first_step[t] is None else str(result.first_step[t]) for t in comparison.thresholds),
            speedup_cell(comparison, result),
        ]
        for result in results
    ]
    return markdown_table(["method", "best", *(f"{100 * t:g} %" for t in comparison.thresholds), "speed-up"], rows)


def speedup_cell(comparison: Comparison, result: MethodResult) -> str:
    """`5.0x`; `never` where the baseline's best accuracy was not reached, `from the start` at step 0, `-` without a baseline."""
    if result.speedup is not None:
        return f"{result.speedup:.1f}x"
    if not any(other.method == comparison.baseline and other.scope == result.scope for other in comparison.results):
        return "-"
    return "never" if result.target_step is None else "from the start"


def _runs_table(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        first, last = min(run.accuracy), max(run.accuracy)
        ends = [f"{100 * run.accuracy[step]:.1f} @{step}" for step in (first, last)]
        rows.append([run.directory, run.base, run.method, str(run.seed), *ends])
    return markdown_table(["run", "base", "method", "seed", "first accuracy", "last accuracy"], rows)


def unfinished(comparison: Comparison) -> list[str]:
    """One sentence on the runs that have not done all their steps, or none."""
    short = [f"{run.directory} ({run.last_step} of {run.planned_steps})" for run in comparison.runs if run.last_step < run.planned_steps]
    return [f"Unfinished runs (steps done): {', '.join(short)}. A mean stands only at steps that all its runs have."] if short else []


def percent(value: Estimate | None, spec: str = ".1f") -> str:
    """`57.4 [55.0, 59.8]`, without brackets where there is no interval, `-` for None."""
    if value is None:
        return "-"
    interval = "" if value.low is None or value.high is None else f" [{100 * value.low:{spec}}, {100 * value.high:{spec}}]"
    return f"{100 * value.mean:{spec}}{interval}"
