"""AntiSD's step against plain GRPO's, stage by stage, at both shapes: `python -m benchmarks.step_time [--shape bench] [--rounds 2]`.

Real runs of `megatron_antisd.train` on two processes, the methods by turns, so that a machine that gets slower slows both.
The goal is a ratio of at most 1.4.

The train part, teacher and step, is held against its arithmetic floor: with the student's forward pass over the responses as the unit, a step
costs c = 3 of them (4 under full recompute), the teacher one more and its trunks' 2p/G, p the trunk's tokens over a response's: (c + 1 + 2p/G) / c.
Here all of a group are shown one solution, so the work done is p/G less; both floors are printed. The goal of 1.05 floors is for the bench
shape without tensor parallelism (`--layout data-parallel`): at tiny sizes over gloo it is the collectives that count, not arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import machine, median, train
from benchmarks.workload import PROMPT_WORDS, WORKLOADS, Workload, make_inputs, write_config

METHODS = ("grpo", "antisd")
STAGES = ("generate", "grade", "teacher", "step", "sync")
GOAL, FLOOR_GOAL = 1.4, 1.05
LAYOUTS = {"tensor-parallel": 2, "data-parallel": 1}


def measure(workload: Workload, directory: Path, rounds: int, layout: str) -> dict[str, list[dict[str, Any]]]:
    """The steps that count of every method, over all rounds."""
    make_inputs(workload, directory)
    rows: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for number in range(rounds):
        for method in METHODS if number % 2 == 0 else METHODS[::-1]:
            config = write_config(workload, directory, method, method, model_parallel_size=LAYOUTS[layout])
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


def train_part(rows: dict[str, list[dict[str, Any]]], workload: Workload) -> tuple[float, float, float]:
    """Teacher and step of antisd over grpo's step; the floor with two trunks a group, and with the one that the work has."""
    seconds = {method: stage_seconds(rows[method]) for method in METHODS}
    ratio = (seconds["antisd"]["teacher"] + seconds["antisd"]["step"]) / seconds["grpo"]["step"]
    trunk = (PROMPT_WORDS + 1 + workload.new_tokens) / workload.new_tokens
    two, one = ((3 + 1 + trunks * trunk / workload.rollouts) / 3 for trunks in (2, 1))
    return ratio, two, one


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a ratio is above the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(WORKLOADS), action="append", help="default: both")
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="tensor-parallel", help="of the two processes")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each method at each shape")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args(arguments)
    reached = True
    for name in given.shape or list(WORKLOADS):
        print(f"{name}, {given.layout}: AntiSD against GRPO", flush=True)
        directory = (given.output / f"step_time-{name}").absolute()
        directory.mkdir(parents=True, exist_ok=True)
        rows = measure(WORKLOADS[name], directory, given.rounds, given.layout)
        ratio = median(rows["antisd"], "seconds_total") / median(rows["grpo"], "seconds_total")
        part, two, one = train_part(rows, WORKLOADS[name])
        reached = reached and ratio <= GOAL
        if name == "bench" and given.layout == "data-parallel":
            reached = reached and part <= FLOOR_GOAL * two
        print(f"\n{table(rows)}\n\n{name}: AntiSD / GRPO = {ratio:.2f} (goal: at most {GOAL}), {len(rows['grpo'])} steps each\n"
              f"train part: {part:.3f}, {part / two:.2f} x the floor of two trunks ({two:.3f}), {part / one:.2f} x that of one ({one:.3f})\n",
              flush=True)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
