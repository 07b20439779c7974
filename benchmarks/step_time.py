"""AntiSD's step against plain GRPO's, stage by stage, at both shapes: `python -m benchmarks.step_time [--shape bench] [--rounds 2]`.

Real runs of `megatron_antisd.train` on two processes, the methods by turns, so that a machine that gets slower slows both.
The goal is a ratio of at most 1.4.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import machine, median, train
from benchmarks.workload import WORKLOADS, Workload, make_inputs, write_config

METHODS = ("grpo", "antisd")
STAGES = ("generate", "grade", "teacher", "step", "sync")
GOAL = 1.4


def measure(workload: Workload, directory: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The steps that count of every method, over all rounds."""
    make_inputs(workload, directory)
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS if number % 2 == 0 else METHODS[::-1]:
            config = write_config(workload, directory, method, method)
            counted = train(config, directory / method)[0][workload.warm_up :]
            check_work(workload, method, counted)
            rows[method] += counted
            print(f"  round {number + 1}, {method}: {median(counted, 'seconds_total'):.3f} s a step; {machine()}", flush=True)
    return rows


def check_work(workload: Workload, method: str, rows: Sequence[dict[str, Any]]) -> None:
    """Every step did the work it is credited with. Raises RuntimeError otherwise."""
    tokens = workload.sequences * workload.new_tokens
    for row in rows:
        right = row["tokens"] == tokens and not row["updates_skipped"]
        if method == "antisd":
            right = right and row["lambda"] > 0 and row["teacher_masked_rollouts"] == 0
        if not right:
            raise RuntimeError(f"{method}, step {row['step']}: expected {tokens} tokens, an applied update, and for antisd a teacher "
                               f"for every rollout; got tokens {row['tokens']}, skipped {row['updates_skipped']}, lambda {row['lambda']}, "
                               f"without teacher {row['teacher_masked_rollouts']}")


def stage_seconds(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians; `other` is what of a step lies outside its stages."""
    def other(row: dict[str, Any]) -> float:
        return row["seconds_total"] - sum(row[f"seconds_{stage}"] for stage in STAGES)

    seconds = {stage: median(rows, f"seconds_{stage}") for stage in STAGES}
    return seconds | {"other": median([{"other": other(row)} for row in rows], "other"), "total": median(rows, "seconds_total")}


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; the last column is antisd / grpo."""
    seconds = {method: stage_seconds(rows[method]) for method in METHODS}
    lines = ["| stage | grpo s | antisd s | ratio |", "|---|---:|---:|---:|"]
    for stage in seconds["grpo"]:
        first, second = (seconds[method][stage] for method in METHODS)
        # A stage of less than a millisecond has no ratio worth a name: the teacher of a method without one.
        lines.append(f"| {stage} | {first:.3f} | {second:.3f} | {f'{second / first:.2f}' if first >= 1e-3 else '-'} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a ratio is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(WORKLOADS), action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each method at each shape")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args(arguments)
    reached = True
    for name in given.shape or list(WORKLOADS):
        print(f"{name}: AntiSD against GRPO", flush=True)
        directory = (given.output / f"step_time-{name}").absolute()
        directory.mkdir(parents=True, exist_ok=True)
        rows = measure(WORKLOADS[name], directory, given.rounds)
        ratio = median(rows["antisd"], "seconds_total") / median(rows["grpo"], "seconds_total")
        reached = reached and ratio <= GOAL
        print(f"\n{table(rows)}\n\n{name}: AntiSD / GRPO = {ratio:.2f} (goal: at most {GOAL}), {len(rows['grpo'])} steps each\n", flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
