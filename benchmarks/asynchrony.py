"""What generation ahead of training gains: `python -m benchmarks.asynchrony [--steps 12] [--accuracy]`.

One core generates (an engine server), one trains (one rank), each pinned. With g and t the seconds of a synchronous step that are generation and that
are all else, a step that overlaps the two can take max(g, t) at best, so the gain can be (g + t) / max(g, t). Goal: 0.85 of that, at staleness 1.
Beside it the synchronous run with the engine inside the trainer, on both cores (two data-parallel ranks that first generate, then train), as it is.

`--accuracy` trains the quickstart's task instead, synchronously and at staleness 1 and 2 (each on both cores, `--steps` steps), and prints the
accuracy after every evaluation; it needs the quickstart's inputs (`python -m examples.quickstart.prepare runs/quickstart-inputs`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, child_environment, machine, median, train
from benchmarks.workload import WORKLOADS, make_inputs, write_config

GOAL = 0.85
STALENESS = (0, 1, 2)


@contextlib.contextmanager
def server(config: Path, directory: Path, cores: Collection[int] | None) -> Iterator[list[str]]:
    """An engine server; yields what a trainer's configuration needs to find it."""
    token = directory / "token"
    token.unlink(missing_ok=True)
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(16))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        store = f"127.0.0.1:{probe.getsockname()[1]}"
    keys = ["rollout.mode=servers", f"servers.store={store}", f"servers.token_file={token}"]
    with (directory / "server.log").open("w") as log:
        command = [sys.executable, "-m", "megatron_antisd.serve", str(config), *keys]
        process = subprocess.Popen(command, cwd=ROOT, env=child_environment(1), stdout=log, stderr=subprocess.STDOUT,
                                   preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores))
    try:
        yield keys
    finally:
        process.terminate()
        process.wait(60)


def overlap(directory: Path, steps: int) -> int:
    """The table; 1 where the goal is missed."""
    workload = WORKLOADS["bench"]
    make_inputs(workload, directory)
    trainer_core, engine_core = sorted(os.sched_getaffinity(0))[:2]
    rows: dict[str, list[dict[str, Any]]] = {}
    config = write_config(workload, directory, "async", "antisd", model_parallel_size=1, steps=steps)
    with server(config, directory, {engine_core}) as keys:
        for name, staleness in (("synchronous", 0), ("staleness 1", 1)):
            rows[name] = train(config, directory / "async", processes=1, cores={trainer_core},
                               overrides=[*keys, f"asynchrony.max_staleness={staleness}", "correction.mode=truncate"])[0][workload.warm_up + 1 :]
    both = write_config(workload, directory, "both", "antisd", model_parallel_size=1, steps=steps)
    rows["both cores"] = train(both, directory / "both", processes=2)[0][workload.warm_up + 1 :]
    total = {name: median(found, "seconds_total") for name, found in rows.items()}
    g = median(rows["synchronous"], "seconds_generate")
    t = total["synchronous"] - g
    possible, gained = (g + t) / max(g, t), total["synchronous"] / total["staleness 1"]
    print(f"\n{machine()}\n\n| run | step | waits for generation | against synchronous, pinned |\n|---|---|---|---|")
    for name, found in rows.items():
        print(f"| {name} | {total[name]:.3f} s | {median(found, 'seconds_generate'):.3f} s | {total['synchronous'] / total[name]:.2f} x |")
    print(f"\ng = {g:.3f} s, t = {t:.3f} s: possible {possible:.2f} x, gained {gained:.2f} x = {gained / possible:.2f} of it (goal {GOAL})")
    print(f"against the synchronous run on both cores: {total['both cores'] / total['staleness 1']:.2f} x")
    return int(gained < GOAL * possible)


def accuracy(directory: Path, steps: int) -> int:
    """The curves."""
    config, curves = ROOT / "examples/quickstart/config.yaml", {}
    for staleness in STALENESS:
        name = f"quickstart-staleness-{staleness}"
        with server(config, directory, None) as keys:
            train(config, directory / name, overrides=[
                *keys, f"run.name={name}", f"run.directory={directory / name}", f"run.steps={steps}", f"asynchrony.max_staleness={staleness}",
                "checkpoint.save_hf=false"])
        lines = [json.loads(line) for line in (directory / name / "metrics.jsonl").read_text().splitlines()]
        curves[staleness] = {row["step"]: row["eval/search/avg@1"] for row in lines if "eval/search/avg@1" in row}
    print(f"\n{machine()}\n\n| step | {' | '.join(f'staleness {staleness}' for staleness in STALENESS)} |\n|---|{'---|' * len(STALENESS)}")
    for step in curves[0]:
        print(f"| {step} | {' | '.join(f'{100 * curves[staleness][step]:.1f} %' for staleness in STALENESS)} |")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmarks/asynchrony"))
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    return (accuracy if arguments.accuracy else overlap)(arguments.directory.resolve(), arguments.steps)


if __name__ == "__main__":
    sys.exit(main())
