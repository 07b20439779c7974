"""How far apart layouts train the same: `python -m benchmarks.determinism [--repeats 2] [--only dp2 ...]`.

One run saves its rollouts; every layout then trains 5 steps on those from the same checkpoint, so that nothing but the order of sums differs. The
table shows the largest differences to one rank over the steps, and how many runs of a layout were bit for bit the first one again: every
figure of metrics.jsonl but the times, and every exported weight.

Goals: all repeats bitwise; the same gate in all layouts; in float32, loss and entropy within 1e-5 of one rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.launch import machine, train
from benchmarks.workload import WORKLOADS, Workload, make_inputs, write_config

STEPS = 5
GOAL = 1e-5
# Weights far from zero: with the usual small ones all logits are nearly equal, and little could go wrong.
WORKLOAD = dataclasses.replace(WORKLOADS["quickstart"], name="determinism", warm_up=0, steps=STEPS,
                               model=dataclasses.replace(WORKLOADS["quickstart"].model, initializer_range=0.1))
COMMON = ("trainer.micro_batch_tokens=2048", "trainer.score_micro_batch_tokens=4096", "optimizer.lr=1e-4", "gate.mode=teacher",
          "checkpoint.save_hf=true", "logging.tensorboard=false")
TIMES = ("seconds", "tokens_per_second")
FIGURES = ("loss", "grad_norm", "teacher_entropy_median")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to train on the saved rollouts."""

    ranks: int
    overrides: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


LAYOUTS = {
    "one": Layout(ranks=1),
    "one, half the micro-batch": Layout(ranks=1, overrides=("trainer.micro_batch_tokens=1024", "trainer.score_micro_batch_tokens=2048"),
                                      dtypes=("float32",)),
    "tp2-ep2": Layout(ranks=2, overrides=("parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2")),
    "pp2": Layout(ranks=2, overrides=("parallel.pipeline_parallel_size=2",), dtypes=("float32",)),
    "pp2-vpp2": Layout(ranks=2, overrides=("parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"), dtypes=("float32",)),
    "cp2": Layout(ranks=2, overrides=("parallel.context_parallel_size=2",)),
    "dp2": Layout(ranks=2),
    "dp2, plain optimizer": Layout(ranks=2, overrides=("parallel.distributed_optimizer=false",), dtypes=("float32",)),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run left."""

    rows: list[dict[str, Any]]
    """Its training rows without times."""
    weights: dict[str, Any]
    """Hugging Face name -> tensor as exported."""

    def same(self, other: Result) -> bool:
        """Bit for bit."""
        import torch

        return self.rows == other.rows and all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())


def read(rows: Sequence[dict[str, Any]], directory: Path) -> Result:
    from safetensors.torch import load_file

    weights = {name: tensor for path in sorted((directory / "hf").glob("*.safetensors")) for name, tensor in load_file(path).items()}
    if len(rows) != STEPS or not weights or any(row["updates_skipped"] for row in rows):
        raise RuntimeError(f"{directory}: expected {STEPS} applied steps and exported weights, got {len(rows)} steps and {len(weights)} weights")
    return Result(rows=[{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows], weights=weights)


def measure(directory: Path, layouts: Sequence[str], repeats: int, workload: Workload = WORKLOAD) -> dict[tuple[str, str], list[Result]]:
    """(dtype, layout) -> its runs, one rank first."""
    make_inputs(workload, directory)
    config = write_config(workload, directory, "saved", "antisd", model_parallel_size=1)
    saved = f"debug.save_rollouts={directory / 'rollouts'}"
    train(config, directory / "saved", processes=1, overrides=[*COMMON, "rollout.engine=megatron", saved])
    replay = [*COMMON, "rollout.engine=megatron", f"debug.load_rollouts={directory / 'rollouts'}"]
    results: dict[tuple[str, str], list[Result]] = {}
    for dtype in ("float32", "bfloat16"):
        for name in ("one", *(name for name in layouts if name != "one")):
            layout = LAYOUTS[name]
            if dtype not in layout.dtypes:
                continue
            runs = results.setdefault((dtype, name), [])
            for number in range(repeats):
                folder = directory / f"{dtype}-{name.replace(', ', '-').replace(' ', '-')}-{number + 1}"
                overrides = [*replay, *layout.overrides, f"model.dtype={dtype}", f"run.directory={folder}"]
                runs.append(read(train(config, folder, processes=layout.ranks, overrides=overrides)[0], folder))
            print(f"  {line(dtype, name, runs, results[dtype, 'one'][0])} {machine()}", flush=True)
    return results


def differences(result: Result, reference: Result) -> dict[str, float]:
    """Largest over the steps for each of FIGURES; of the weights the largest element and the mean; steps with the same gate."""
    found = {key: max(abs(mine[key] - theirs[key]) for mine, theirs in zip(result.rows, reference.rows, strict=True)) for key in FIGURES}
    apart = [(tensor.double() - reference.weights[name].double()).abs() for name, tensor in result.weights.items()]
    found["largest weight"] = max(float(each.max()) for each in apart)
    found["mean weight"] = sum(float(each.sum()) for each in apart) / sum(each.numel() for each in apart)
    found["gates"] = sum((mine["gate_open"], mine["lambda"]) == (theirs["gate_open"], theirs["lambda"])
                         for mine, theirs in zip(result.rows, reference.rows, strict=True))
    return found


def line(dtype: str, name: str, runs: Sequence[Result], reference: Result) -> str:
    """A row of the table."""
    found = differences(runs[0], reference)
    cells = [f"{found[key]:.1e}" if found[key] else "0" for key in (*FIGURES, "largest weight", "mean weight")]
    cells.insert(len(FIGURES), f"{found['gates']:.0f} of {STEPS}")
    return f"| {dtype} | {name} | {' | '.join(cells)} | {sum(run.same(runs[0]) for run in runs[1:])} of {len(runs) - 1} |"


def table(results: dict[tuple[str, str], list[Result]]) -> str:
    """Markdown: a row a layout and dtype."""
    lines = ["| dtype | layout | loss | gradient norm | teacher's median entropy | same gate | largest weight | mean weight | repeats bitwise |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [line(dtype, name, runs, results[dtype, "one"][0]) for (dtype, name), runs in results.items()])


def reached(results: dict[tuple[str, str], list[Result]]) -> bool:
    """Whether the goals are met."""
    good = all(run.same(runs[0]) for runs in results.values() for run in runs)
    for (dtype, _), runs in results.items():
        found = differences(runs[0], results[dtype, "one"][0])
        near = dtype != "float32" or max(found["loss"], found["teacher_entropy_median"]) <= GOAL
        good = good and near and found["gates"] == STEPS
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(LAYOUTS), action="append", help="these layouts beside one rank; default: all")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each layout")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    given = parser.parse_args(arguments)
    directory = (given.output / "determinism").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    results = measure(directory, given.only or list(LAYOUTS), given.repeats)
    rows = results["float32", "one"][0].rows
    print(f"\n{table(results)}\n\none rank in float32: losses {', '.join(format(row['loss'], '.4f') for row in rows)}, gradient norms "
          f"{', '.join(format(row['grad_norm'], '.3f') for row in rows)}, lambda {', '.join(str(row['lambda']) for row in rows)}")
    return 0 if reached(results) else 1


if __name__ == "__main__":
    sys.exit(main())
