"""What does a checkpoint cost the step in which it is written, and how large is it: `python -m benchmarks.checkpoints`.

One run, in which checkpoints take turns: none, in the background, none, waited for. What one adds is the time that `save` takes plus how much
longer the step after it is, against steps beside which nothing is written; medians. Here the two ranks keep both cores busy, so that writing takes
its time from training; on a node with cores to spare it does not.

Goals: in the background less than 5 % of a step, and a checkpoint at most 1.05 times its state (weights and both moments, 12 bytes a parameter).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.launch import machine, read_metrics, run
from benchmarks.workload import WORKLOADS, make_inputs, write_config
from megatron_antisd.parallel.checkpoint_files import checkpoints, read_manifest

ADDED, BYTES = 0.05, 1.05
STATE_BYTES = 12
"""fp32 weight and two moments of each parameter."""


def parameters(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(WORKLOADS), default="bench")
    parser.add_argument("--steps", type=int, default=24, help="steps that count")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args(arguments)
    workload, directory = WORKLOADS[given.shape], (given.output / f"checkpoints-{given.shape}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    make_inputs(workload, directory)
    config = write_config(workload, directory, "run", "antisd", steps=given.steps + 1)
    calls_file = directory / "calls.json"
    shutil.rmtree(directory / "run", ignore_errors=True)
    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("checkpoint_ranks.py")),
         str(calls_file), str(config)], threads=1)
    seconds = {row["step"]: row["seconds_total"] for row in read_metrics(directory / "run")}
    cost: dict[str, list[float]] = {}
    call: dict[str, list[float]] = {}
    for made in json.loads(calls_file.read_text()):
        if made["step"] > workload.warm_up and made["step"] + 1 in seconds:
            cost.setdefault(made["mode"], []).append(made["seconds"] + seconds[made["step"] + 1])
            call.setdefault(made["mode"], []).append(made["seconds"])
    step = statistics.median(cost["none"])
    print(f"{given.shape}, a step takes {step:.2f} s; {machine()}\n\n"
          "| checkpoint | `save` takes, s | adds to the step | goal | times |\n|---|---:|---:|---:|---:|")
    added = {mode: statistics.median(cost[mode]) / step - 1 for mode in ("background", "blocking")}
    for mode, share in added.items():
        goal = f"below {ADDED:.0%}" if mode == "background" else "-"
        print(f"| {mode} | {statistics.median(call[mode]):.3f} | {share:.1%} | {goal} | {len(cost[mode])} |")
    newest = checkpoints(directory / "run" / "checkpoints")[-1]
    size = sum(read_manifest(newest)["files"].values()) + (newest / "manifest.json").stat().st_size
    ratio = size / (STATE_BYTES * parameters(directory / "checkpoint"))
    print(f"\nA checkpoint has {size / 1e6:.2f} MB, {ratio:.3f} times its state (goal: at most {BYTES})")
    return 0 if added["background"] < ADDED and ratio <= BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
