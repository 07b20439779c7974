"""What a paper shows of its runs: Table 1, Figure 3 and Figure 4 with the gate, as Markdown, PNG and one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_antisd.metrics import MetricsError
from megatron_antisd.reporting.compare import ALL_BASES, BASELINE, ROUNDING, Comparison, MethodResult, compare_loaded
from megatron_antisd.reporting.figures import MAX_GATES, plot_gates, plot_pass_at_k
from megatron_antisd.reporting.intervals import Estimate, estimate
from megatron_antisd.reporting.page import Section, Table, html_page, markdown_page
from megatron_antisd.reporting.paper import paper_result
from megatron_antisd.reporting.plots import FIGURE_4, plot_runs
from megatron_antisd.reporting.runs import RunData, load_run
from megatron_antisd.reporting.tables import INTERVALS, percent, speedup_cell, unfinished

TITLE = "Results"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a report of several runs compares."""

    baseline: str = BASELINE
    """The method that the speed-up refers to."""
    benchmark: str | None = None
    """Table 1 on this one alone; None: on all, which every run must share."""
    pass_benchmark: str | None = None
    """Figure 3's; None: the first of those with the largest k."""
    paper: bool = False
    """With the paper's own numbers in a column of their own."""


def write_results(directories: Sequence[Path | str], output_dir: Path | str, choices: Choices | None = None) -> list[Path]:
    """Write results.md, results.html, figure3.png, figure4.png and gate.png into `output_dir`; returns what was written.

    A picture for which the runs recorded nothing is left out, and the text says so. Raises FileNotFoundError for a directory without a
    run, ValueError or MetricsError for runs without evaluations, on different benchmarks, or without the chosen benchmark.
    """
    choices = choices or Choices()
    runs = [load_run(directory) for directory in directories]
    comparison = compare_loaded(runs, benchmark=choices.benchmark, baseline=choices.baseline)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    sections = [
        _table_1(runs, comparison, choices),
        _figure_3(runs, comparison, choices, output),
        Section(title="Figure 4: training", picture=plot_runs(runs, output / "figure4.png", panels=FIGURE_4),
                alternative="Train reward, evaluation accuracy, teacher entropy with the gate, student entropy, response length, truncation"),
        _gates(runs, output),
        _run_list(comparison),
    ]  # fmt: skip
    text, page = output / "results.md", output / "results.html"
    text.write_text(markdown_page(TITLE, sections))
    page.write_text(html_page(TITLE, sections))
    return [text, page, *(section.picture for section in sections if section.picture is not None)]


def _members(runs: Sequence[RunData], comparison: Comparison, result: MethodResult) -> list[RunData]:
    return [run for run, summary in zip(runs, comparison.runs, strict=True)
            if summary.method == result.method and result.scope in (summary.base, ALL_BASES)]  # fmt: skip


def _table_1(runs: Sequence[RunData], comparison: Comparison, choices: Choices) -> Section:
    names = sorted({key.split("/")[1] for key in runs[0].benchmarks}) if choices.benchmark is None else [choices.benchmark]
    header = ["model", "method", "runs", *(f"{name} {_average_of(runs, name)}" for name in names), "mean", "best step", "speed-up"]
    rows, kinds, means = [], set(), []
    for result in comparison.results:
        members = _members(runs, comparison, result)
        cells = [_benchmark_estimate(members, name, result.best_step) for name in names]
        mean = _with_samples_interval(result.accuracy[result.best_step], cells)
        kinds.add(mean.kind)
        means.append(mean)
        rows.append([result.scope, result.method, str(result.runs), *map(percent, cells), percent(mean), str(result.best_step),
                     speedup_cell(comparison, result)])  # fmt: skip
    notes = [_interval_text(kinds), _speedup_text(comparison)]
    if choices.paper:
        notes.append(_add_paper(header, rows, runs, comparison))
    return Section(
        title="Table 1: accuracy at the best step",
        text=("In percent, each row at the step where its mean over benchmarks is highest; that step is chosen on the same evaluations, so "
              "the numbers lean upwards, most where evaluations are many and small.",),
        table=Table(header=tuple(header), rows=tuple(map(tuple, rows))),
        notes=tuple(notes),
    )  # fmt: skip


def _average_of(runs: Sequence[RunData], name: str) -> str:
    """`avg@32`, or all that occur."""
    return "/".join(sorted({key.split("/")[2] for run in runs for key in run.benchmarks if key.split("/")[1] == name}))


def _benchmark_estimate(members: Sequence[RunData], name: str, step: int) -> Estimate:
    """Several runs: the interval over them. One run: the one of its evaluation, over problems, where it was recorded."""
    values: dict[str, list[float]] = {}
    for run in members:
        values.setdefault(run.config.model.path, []).append(run.accuracy(name)[step])
    found = estimate(values)
    if found.kind != "single":
        return found
    row = members[0].at(step)
    # A run evaluates a benchmark with one k.
    k = next(key.partition("@")[2] for key in members[0].benchmarks if key.split("/")[1] == name and row.get(key) is not None)
    low, high = row.get(f"eval/{name}/low@{k}"), row.get(f"eval/{name}/high@{k}")
    known = low is not None and high is not None
    return Estimate(mean=found.mean, low=low if known else None, high=high if known else None, runs=1, kind="problems" if known else "single")


def _with_samples_interval(mean: Estimate, cells: Sequence[Estimate]) -> Estimate:
    """A single run's mean over benchmarks: benchmarks are independent, so their half-widths add in squares."""
    if mean.kind != "single" or any(cell.kind != "problems" for cell in cells):
        return mean
    below = sum((cell.mean - cell.low) ** 2 for cell in cells) ** 0.5 / len(cells)
    above = sum((cell.high - cell.mean) ** 2 for cell in cells) ** 0.5 / len(cells)
    return Estimate(mean=mean.mean, low=mean.mean - below, high=mean.mean + above, runs=1, kind="problems")


def _interval_text(kinds: set[str]) -> str:
    texts = INTERVALS | {"problems": "bootstrap over the problems for a single run, which says nothing of other seeds"}
    return "In brackets, 95 % intervals: " + "; ".join(text for kind, text in texts.items() if kind in kinds) + "."


def _speedup_text(comparison: Comparison) -> str:
    if not any(result.method == comparison.baseline for result in comparison.results):
        methods = sorted({result.method for result in comparison.results})
        return f"No run is {comparison.baseline}, so there is no speed-up; methods here: {', '.join(methods)}."
    return (f"Speed-up: the step at which {comparison.baseline} is best / the first evaluated step at which the row reaches that accuracy. "
            "It is no finer than the steps that were evaluated.")  # fmt: skip


def _add_paper(header: list[str], rows: list[list[str]], runs: Sequence[RunData], comparison: Comparison) -> str:
    """Add the column; returns the note to it."""
    models = {summary.base: run.config.model.path for run, summary in zip(runs, comparison.runs, strict=True)}
    found = [paper_result(models.get(row[0], row[0]), row[1]) for row in rows]
    if not any(found):
        return "The paper has no row for any of these models and methods."
    header.append("paper: mean @ best step, speed-up")
    for row, result in zip(rows, found, strict=True):
        row.append("-" if result is None else str(result))
    return "Last column: the numbers of arXiv 2605.11609, of its own code and seven benchmarks, not measured here."


def _figure_3(runs: Sequence[RunData], comparison: Comparison, choices: Choices, output: Path) -> Section:
    title = "Figure 3: pass@k"
    best = {run.directory: _best_step(run, choices.benchmark) for run in runs}
    largest = {name: max((max(run.pass_at(name, best[run.directory]), default=0) for run in runs), default=0)
               for name in sorted({key.split("/")[1] for run in runs for key in run.benchmarks})}  # fmt: skip
    name = choices.pass_benchmark or max(largest, key=lambda one: (largest[one], -list(largest).index(one)))
    if name not in largest:
        raise MetricsError(f"no run was evaluated on {name!r}; the runs have {sorted(largest)}")
    if not largest[name]:
        return Section(title=title, text=(f"The runs recorded no pass@k on {name} at their best steps.",))
    sizes = sorted({*(2**power for power in range(largest[name].bit_length())), largest[name]})
    rows = []
    for run, summary in zip(runs, comparison.runs, strict=True):
        curve = run.pass_at(name, best[run.directory])
        rows.append((f"{summary.base}, {summary.method}, seed {summary.seed}", f"{best[run.directory]}",
                     *(_pass_cell(curve.get(k)) for k in sizes)))  # fmt: skip
    return Section(
        title=f"{title} on {name}",
        text=("Each run at its own best step; bands and brackets are 95 % bootstrap intervals over problems.",),
        table=Table(header=("run", "step", *(f"pass@{k}" for k in sizes)), rows=tuple(rows)),
        picture=plot_pass_at_k(runs, best, name, output / "figure3.png"), alternative=f"pass@k over k on {name}, one curve a run",
    )  # fmt: skip


def _best_step(run: RunData, benchmark: str | None) -> int:
    accuracy = run.accuracy(benchmark)
    return max(accuracy, key=lambda step: (round(accuracy[step], ROUNDING), -step))


def _pass_cell(point: tuple[float, float | None, float | None] | None) -> str:
    if point is None:
        return "-"
    known = point[1] is not None and point[2] is not None
    return percent(Estimate(mean=point[0], low=point[1] if known else None, high=point[2] if known else None, runs=1, kind="problems"))


def _gates(runs: Sequence[RunData], output: Path) -> Section:
    title = "The entropy gate"
    picture = plot_gates(runs, output / "gate.png")
    if picture is None:
        return Section(title=title, text=("None of these runs has a teacher term, so there is no gate.",))
    return Section(title=title, picture=picture, alternative="Gate state, H, H_warm and tau_down over the steps of each run with a gate",
                   notes=(f"The first {MAX_GATES} runs that have a gate.",) if len(runs) > MAX_GATES else ())  # fmt: skip


def _run_list(comparison: Comparison) -> Section:
    rows = []
    for run in comparison.runs:
        first, last = min(run.accuracy), max(run.accuracy)
        rows.append((run.directory, run.base, run.method, str(run.seed), f"{run.last_step} of {run.planned_steps}",
                     f"{100 * run.accuracy[first]:.1f} @{first}", f"{100 * run.accuracy[last]:.1f} @{last}"))  # fmt: skip
    header = ("run", "model", "method", "seed", "steps", "first mean", "last mean")
    return Section(title="Runs", table=Table(header=header, rows=tuple(rows)), notes=tuple(unfinished(comparison)))
