"""Methods side by side: accuracy with confidence intervals over seeds and base models, differences, first steps, speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_antisd.reporting.intervals import Estimate, estimate
from megatron_antisd.reporting.runs import RunData, distinct_names, load_run, method_labels

ALL_BASES = "all bases"
BASELINE = "grpo"
THRESHOLDS = (0.25, 0.5, 0.65)
ROUNDING = 9  # decimals: equal accuracies must not differ by the rounding of their means


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One method on one base model, or on all of them."""

    scope: str
    """The base model's name, or ALL_BASES (only methods that were run on each)."""
    method: str
    runs: int
    accuracy: dict[int, Estimate]
    """Step -> accuracy, at the steps where every run has one."""
    difference: dict[int, Estimate]
    """Step -> accuracy minus the baseline's, in pairs of the same base and seed; empty where there are no pairs."""
    best_step: int
    """Where the mean accuracy is highest (the first such step)."""
    first_step: dict[float, int | None]
    """Threshold -> the first evaluated step at which the mean accuracy reaches it; None: never."""
    target_step: int | None
    """The first step at which this method reaches the baseline's best accuracy; None: never, or there is no baseline."""
    speedup: float | None
    """The baseline's best step / the first step at which this method reaches the baseline's best accuracy, on mean curves
    (method's definition). None: never reached, no baseline, or reached at step 0."""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run of the comparison."""

    directory: str
    base: str
    method: str
    seed: int
    last_step: int
    planned_steps: int
    accuracy: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare_runs` found; `tables.comparison_markdown` and `tables.write_comparison` put it into files."""

    benchmark: str
    baseline: str
    thresholds: tuple[float, ...]
    results: tuple[MethodResult, ...]
    runs: tuple[RunSummary, ...]


def compare_runs(
    directories: Sequence[Path | str], *, benchmark: str | None = None, thresholds: Sequence[float] = THRESHOLDS, baseline: str = BASELINE
) -> Comparison:
    """Read the runs, group them by (base model, method, seed) from their own configurations, and compare.

    `benchmark`: its accuracy (None: the mean over all of a run). `baseline`: the method label that differences and the speed-up refer to.
    Raises ValueError for two runs of the same base, method and seed, and for a run without evaluations.
    """
    return compare_loaded([load_run(directory) for directory in directories], benchmark=benchmark, thresholds=thresholds, baseline=baseline)


def compare_loaded(
    runs: Sequence[RunData], *, benchmark: str | None = None, thresholds: Sequence[float] = THRESHOLDS, baseline: str = BASELINE
) -> Comparison:
    """`compare_runs` of runs that were read already; `Comparison.runs` is in their order."""
    if not runs:
        raise ValueError("there are no runs to compare; give at least one run directory")
    labels = method_labels(runs)
    baseline = _matching_label(baseline, labels)
    _check_distinct(runs, labels)
    _check_benchmarks(runs, benchmark)
    paths = [run.config.model.path for run in runs]
    names = dict(zip(dict.fromkeys(paths), distinct_names(list(dict.fromkeys(paths))), strict=True))
    summaries = [_summary(run, label, names[run.config.model.path], benchmark) for run, label in zip(runs, labels, strict=True)]
    results = []
    for base in names.values():
        results += _scope_results(base, [run for run in summaries if run.base == base], baseline, tuple(thresholds))
    if len(names) > 1:
        results += _scope_results(ALL_BASES, _on_every_base(summaries), baseline, tuple(thresholds))
    shown = benchmark or ", ".join(sorted(key.removeprefix("eval/") for key in runs[0].benchmarks))
    return Comparison(benchmark=shown, baseline=baseline, thresholds=tuple(thresholds), results=tuple(results), runs=tuple(summaries))


def _on_every_base(summaries: Sequence[RunSummary]) -> list[RunSummary]:
    """The runs of methods that were run on all base models: means over different bases would compare the bases."""
    bases = {run.base for run in summaries}
    complete = {run.method for run in summaries if {other.base for other in summaries if other.method == run.method} == bases}
    return [run for run in summaries if run.method in complete]


def _scope_results(scope: str, members: Sequence[RunSummary], baseline: str, thresholds: tuple[float, ...]) -> list[MethodResult]:
    by_method: dict[str, list[RunSummary]] = {}
    for member in members:
        by_method.setdefault(member.method, []).append(member)
    curves = {method: _curve([(run.base, run.accuracy) for run in runs]) for method, runs in by_method.items()}
    results = []
    for method, runs in by_method.items():
        accuracy, target = curves[method], _target_step(curves[method], curves.get(baseline))
        if not accuracy:
            raise ValueError(f"{method} on {scope}: no step was evaluated in all of {[run.directory for run in runs]}")
        results.append(
            MethodResult(
                scope=scope, method=method, runs=len(runs), accuracy=accuracy,
                difference=_difference(runs, by_method.get(baseline, [])) if method != baseline else {},
                best_step=_best_step(accuracy),
                first_step={threshold: _first_step(accuracy, threshold) for threshold in thresholds},
                target_step=target,
                speedup=_best_step(curves[baseline]) / target if target else None,
            )
        )  # fmt: skip
    return results


def _curve(members: Sequence[tuple[str, dict[int, float]]]) -> dict[int, Estimate]:
    """(base, step -> value) of each run -> step -> estimate, at the steps that all runs have."""
    if not members:
        return {}
    steps = sorted(set.intersection(*(set(table) for _, table in members)))
    curve = {}
    for step in steps:
        by_base: dict[str, list[float]] = {}
        for base, table in members:
            by_base.setdefault(base, []).append(table[step])
        curve[step] = estimate(by_base)
    return curve


def _difference(runs: Sequence[RunSummary], baseline_runs: Sequence[RunSummary]) -> dict[int, Estimate]:
    partners = {(run.base, run.seed): run.accuracy for run in baseline_runs}
    pairs = [(run, partners[run.base, run.seed]) for run in runs if (run.base, run.seed) in partners]
    return _curve([(run.base, {step: run.accuracy[step] - other[step] for step in run.accuracy if step in other}) for run, other in pairs])


def _best_step(curve: dict[int, Estimate]) -> int:
    return max(curve, key=lambda step: (round(curve[step].mean, ROUNDING), -step))


def _first_step(curve: dict[int, Estimate], threshold: float) -> int | None:
    return next((step for step, value in curve.items() if round(value.mean, ROUNDING) >= round(threshold, ROUNDING)), None)


def _target_step(curve: dict[int, Estimate], baseline: dict[int, Estimate] | None) -> int | None:
    return _first_step(curve, baseline[_best_step(baseline)].mean) if baseline else None


def _summary(run: RunData, label: str, base: str, benchmark: str | None) -> RunSummary:
    accuracy = run.accuracy(benchmark)
    if not accuracy:
        raise ValueError(f"{run.directory} has no evaluations to compare; set evaluation.benchmarks in its configuration")
    return RunSummary(
        directory=str(run.directory), base=base, method=label, seed=run.config.run.seed, last_step=run.rows[-1]["step"],
        planned_steps=run.config.run.steps, accuracy=accuracy,
    )  # fmt: skip


def _matching_label(baseline: str, labels: Sequence[str]) -> str:
    """The label itself, or the only one of that method (`grpo` finds `grpo (std=biased)`). One that no run has is kept: without the
    baseline there are no differences and no speed-up."""
    variants = {label for label in labels if label.split(" (")[0] == baseline}
    return variants.pop() if baseline not in labels and len(variants) == 1 else baseline


def _check_distinct(runs: Sequence[RunData], labels: Sequence[str]) -> None:
    seen: dict[tuple[str, str, int], RunData] = {}
    for run, label in zip(runs, labels, strict=True):
        key = (run.config.model.path, label, run.config.run.seed)
        if key in seen:
            raise ValueError(f"{seen[key].directory} and {run.directory} are both {label} from {key[0]} with seed {key[2]}; "
                             "counting one twice would narrow the intervals: leave one out")  # fmt: skip
        seen[key] = run


def _check_benchmarks(runs: Sequence[RunData], benchmark: str | None) -> None:
    """A mean over different benchmarks in different runs compares nothing."""
    for run in runs:
        if benchmark is None and run.benchmarks != runs[0].benchmarks:
            raise ValueError(f"{run.directory} was evaluated on {run.benchmarks} and {runs[0].directory} on {runs[0].benchmarks}; "
                             "name one benchmark that all have")  # fmt: skip
