"""The commands over run directories; `tools/*.py` and `python -m megatron_antisd.reporting` call them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_antisd.config import ConfigError
from megatron_antisd.metrics import MetricsError
from megatron_antisd.reporting.compare import BASELINE, THRESHOLDS, compare_runs
from megatron_antisd.reporting.plots import plot_runs
from megatron_antisd.reporting.report import write_report
from megatron_antisd.reporting.results import Choices, write_results
from megatron_antisd.reporting.runs import load_run
from megatron_antisd.reporting.tables import comparison_markdown, write_comparison
from megatron_antisd.reporting.u_lens import write_u_lens
from megatron_antisd.reporting.u_lens_statistics import MINIMUM_COUNT


def main(arguments: Sequence[str] | None = None) -> int:
    """`plot`, `report`, `compare`, `results` or `u-lens`; returns the exit status. Bad input ends with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m megatron_antisd.reporting", description="Pictures, tables and texts of runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    plot = commands.add_parser("plot", help="curves of one or several runs in one picture")
    plot.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    plot.add_argument("--output", type=Path, help="PNG file (default: curves.png in the first run's directory)")
    report = commands.add_parser("report", help="report.png and report.md of one run")
    report.add_argument("run", type=Path, metavar="RUN", help="run directory")
    report.add_argument("--output", type=Path, help="directory (default: the run's own)")
    compare = commands.add_parser("compare", help="methods over seeds and base models, as tables")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    compare.add_argument("--output", type=Path, help="directory for comparison.md, .json, .csv and .png (default: print only)")
    compare.add_argument("--benchmark", help="compare on this one (default: the mean over all)")
    compare.add_argument("--baseline", default=BASELINE, help="the method that differences and speed-up refer to (default: %(default)s)")
    compare.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS), help="accuracies from 0 to 1")
    _add_results(commands)
    _add_u_lens(commands)
    options = parser.parse_args(arguments)
    try:
        {"plot": _plot, "report": _report, "compare": _compare, "results": _results, "u-lens": _u_lens}[options.command](options)
    except (OSError, ConfigError, MetricsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def plot_main(arguments: Sequence[str] | None = None) -> int:
    """`RUN [RUN ...] [--output FILE]`."""
    return main(["plot", *(sys.argv[1:] if arguments is None else arguments)])


def _plot(options: argparse.Namespace) -> None:
    output = options.output or options.runs[0] / "curves.png"
    print(plot_runs([load_run(run) for run in options.runs], output))


def _report(options: argparse.Namespace) -> None:
    for path in write_report(options.run, options.output or options.run):
        print(path)


def _compare(options: argparse.Namespace) -> None:
    comparison = compare_runs(options.runs, benchmark=options.benchmark, thresholds=options.thresholds, baseline=options.baseline)
    print(comparison_markdown(comparison))
    if options.output is not None:
        write_comparison(comparison, options.output)
        plot_runs([load_run(run) for run in options.runs], options.output / "comparison.png")


def results_main(arguments: Sequence[str] | None = None) -> int:
    """`RUN [RUN ...] --output DIR [--baseline METHOD] ...`."""
    return main(["results", *(sys.argv[1:] if arguments is None else arguments)])


def _add_results(commands: argparse._SubParsersAction) -> None:
    results = commands.add_parser("results", help="the paper's Table 1, Figure 3 and Figure 4, as Markdown, PNG and one HTML page")
    results.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    results.add_argument("--output", type=Path, help="directory for results.md, results.html and the pictures (default: results in the first run's)")
    results.add_argument("--baseline", default=BASELINE, help="the method that the speed-up refers to (default: %(default)s)")
    results.add_argument("--benchmark", help="Table 1 on this one (default: on all, which every run must share)")
    results.add_argument("--pass-benchmark", help="Figure 3's (default: the first of those with the largest k)")
    results.add_argument("--paper", action="store_true", help="add a column with the paper's own numbers for these models and methods")


def _results(options: argparse.Namespace) -> None:
    choices = Choices(baseline=options.baseline, benchmark=options.benchmark, pass_benchmark=options.pass_benchmark, paper=options.paper)
    for path in write_results(options.runs, options.output or options.runs[0] / "results", choices):
        print(path)


def u_lens_main(arguments: Sequence[str] | None = None) -> int:
    """`RUN_OR_FILES... [--output FILE] [--steps STEP ...]`."""
    return main(["u-lens", *(sys.argv[1:] if arguments is None else arguments)])


def _add_u_lens(commands: argparse._SubParsersAction) -> None:
    lens = commands.add_parser("u-lens", help="scored rollouts token by token, as one HTML page")
    lens.add_argument("sources", nargs="+", type=Path, metavar="RUN_OR_FILES", help="run directory, or step_*.jsonl files of its rollouts/")
    lens.add_argument("--output", type=Path, help="HTML file (default: u_lens.html in or beside the first)")
    lens.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="only these (default: all)")
    lens.add_argument("--minimum-count", type=int, default=MINIMUM_COUNT, help="occurrences a token of the tables needs (default: %(default)s)")


def _u_lens(options: argparse.Namespace) -> None:
    print(write_u_lens(options.sources, options.output, steps=options.steps, minimum_count=options.minimum_count))
