"""What a run wastes, how far trainer and engine disagree, what it holds in memory: `python -m benchmarks.scoring`.

    python -m benchmarks.scoring                          a short AntiSD run at the quickstart's shape
    python -m benchmarks.scoring --config CONFIG.yaml     a run of one's own configuration (2 processes)
    python -m benchmarks.scoring --run runs/NAME          a finished run, without its memory

Goals: padding below 1 % of the tokens through the model, mean |trainer - engine log-prob| below 1e-4 nats in float32, below 8 GB
resident over all processes together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import Memory, machine, read_metrics, train
from benchmarks.workload import WORKLOADS, make_inputs, write_config

PADDING, MISMATCH, RESIDENT = 0.01, 1e-4, 8e9


def measure(shape: str, config: Path | None, overrides: Sequence[str], output: Path) -> tuple[list[dict[str, Any]], Memory | None]:
    """A run of `config`, or of the shape's inputs, in a directory of its own."""
    directory = (output / f"scoring-{shape if config is None else config.stem}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        return train(config, directory / "run", watch_memory=True, overrides=[*overrides, f"run.directory={directory / 'run'}"])
    make_inputs(WORKLOADS[shape], directory)
    config = write_config(WORKLOADS[shape], directory, "run", "antisd")
    # Responses end where they end: only uneven rows need padding at all.
    return train(config, directory / "run", watch_memory=True, overrides=["rollout.ignore_eos=false", *overrides])


def largest(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Over all steps. Raises ValueError where a step has no value."""
    missing = [row["step"] for row in rows if row.get(key) is None]
    if missing or not rows:
        raise ValueError(f"{key} is missing in steps {missing[:5]} of {len(rows)}")
    return max(row[key] for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", choices=sorted(WORKLOADS), default="quickstart")
    what.add_argument("--config", type=Path)
    what.add_argument("--run", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("overrides", nargs="*", help="key=value for the run")
    given = parser.parse_args(arguments)
    memory = None
    if given.run is not None:
        rows = read_metrics(given.run)
    else:
        rows, memory = measure(given.shape, given.config, given.overrides, given.output)
    figures = [("padding share, worst step", largest(rows, "padding_share"), PADDING, "{:.3%}"),
               ("trainer against engine log-prob, mean difference, worst step", largest(rows, "mismatch_mean"), MISMATCH, "{:.1e}"),
               ("the same, largest difference of any token", largest(rows, "mismatch_max"), None, "{:.1e}"),
               ("sync probe, mean, worst step", largest(rows, "probe_mean"), None, "{:.1e}")]
    if memory is not None:
        figures.append(("peak resident memory, bytes, all processes", memory.resident, RESIDENT, "{:.2e}"))
        if memory.proportional is not None:
            figures.append(("the same, shared pages counted once", memory.proportional, None, "{:.2e}"))
    print(f"{len(rows)} steps; {machine()}\n\n| figure | measured | goal: below |\n|---|---:|---:|")
    for label, value, goal, form in figures:
        print(f"| {label} | {form.format(value)} | {'-' if goal is None else form.format(goal)} |")
    return 0 if all(goal is None or value < goal for _, value, goal, _ in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
