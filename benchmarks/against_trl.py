"""Our step against TRL's GRPOTrainer on the same work: `python -m benchmarks.against_trl [--rounds 1] [--threads 2]`.

TRL generates with transformers, what its user has on one machine without a server. Both get the same checkpoint, problems, batch, fixed response
length, reward, learning rate and number of threads: TRL one process with all of them, ours one data-parallel rank a thread. Goals:
our GRPO step at least 2 times, our AntiSD step at least 1.5 times as fast. Needs `pip install -e .[bench]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launch import machine, run, train
from benchmarks.step_time import METHODS, check_work
from benchmarks.workload import WORKLOADS, Workload, make_inputs, write_config

GOALS = {"grpo": 2.0, "antisd": 1.5}


def our_seconds(workload: Workload, directory: Path, method: str, threads: int, steps: int) -> list[float]:
    """Seconds of the steps that count of one of our runs: `threads` processes of one thread."""
    config = write_config(workload, directory, method, method, model_parallel_size=1, steps=steps)
    counted = train(config, directory / method, processes=threads)[0][workload.warm_up :]
    check_work(workload, method, counted)
    return [row["seconds_total"] for row in counted]


def trl_seconds(workload: Workload, directory: Path, threads: int, steps: int, micro_batch: int) -> list[float]:
    """The same of a TRL run. Raises RuntimeError when its responses had another length."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        run([sys.executable, "-m", "benchmarks.trl_run", "--shape", workload.name, "--directory", str(directory), "--output", result.name,
             "--steps", str(workload.warm_up + steps), "--micro-batch", str(micro_batch)], threads=threads)
        found = json.load(result)
    if set(found["response_length_mean"]) != {workload.new_tokens}:
        raise RuntimeError(f"TRL's responses had mean lengths {found['response_length_mean']}, expected {workload.new_tokens} in every step")
    return found["seconds"][workload.warm_up :]


def middle(values: Sequence[float]) -> float:
    """The median; of an even count the lower one."""
    return sorted(values)[(len(values) - 1) // 2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(WORKLOADS), default="bench")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each of the three")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run that count")
    parser.add_argument("--threads", type=int, default=2, help="threads of all processes together")
    parser.add_argument("--trl-micro-batch", type=int, default=128, help="TRL's sequences of a forward and backward pass; fastest all at once")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args(arguments)
    workload = WORKLOADS[given.shape]
    directory = (given.output / f"against_trl-{workload.name}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    make_inputs(workload, directory)
    seconds: dict[str, list[float]] = {"grpo": [], "trl": [], "antisd": []}
    for number in range(given.rounds):
        for name in seconds:  # TRL between ours: drift of the machine meets all three
            found = (our_seconds(workload, directory, name, given.threads, given.steps) if name in METHODS
                     else trl_seconds(workload, directory, given.threads, given.steps, given.trl_micro_batch))
            seconds[name] += found
            print(f"  round {number + 1}, {name}: {middle(found):.2f} s a step; {machine()}", flush=True)
    print("\n| trainer | s a step | TRL / this | goal |\n|---|---:|---:|---:|")
    ratios = {name: middle(seconds["trl"]) / middle(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        label = "TRL GRPOTrainer" if name == "trl" else f"megatron_antisd, {name}"
        print(f"| {label} | {middle(values):.2f} | {ratios[name]:.2f} | {GOALS.get(name, '-')} |")
    return 0 if all(ratios[name] >= goal for name, goal in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
