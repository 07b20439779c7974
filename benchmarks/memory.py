"""What each memory lever saves and costs: `python -m benchmarks.memory`.

Each lever alone against none, in processes of their own that take real training steps of a random Qwen3-MoE: on the CPU two data-parallel ranks
(gloo, float32, one thread each), with `--device cuda` one GPU (bfloat16) and the levers that one rank has. The levers run by turns, `--rounds`
times; a time is the fastest step of all rounds, a peak the largest of all ranks. On the CPU the processes' own time is there too, which says more
than the clock where others use the machine. Peaks are above what the process held before the model
was built: on the CPU resident memory (Linux resets its peak; large blocks come straight from the system, so that freed ones count no more, which
is slow, so times come from runs of their own), on a GPU the allocator's.

    python -m benchmarks.memory --rounds 3 --only none,attention,mlp
    python -m benchmarks.memory --device cuda --layers 8 --hidden 2048 --experts 32 --tokens 16384

Needs torch, megatron-core and the package's own dependencies, no vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.launch import ROOT, machine, run

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer
    from megatron_antisd.records import TrainingBatch

ROWS = 2
"""Rows of `--tokens` tokens that a rank has in a step, each of two sequences."""
SMALL_BLOCKS = ("env", "MALLOC_MMAP_THRESHOLD_=65536")  # fixed, so glibc does not raise it after the first large block


@dataclass(frozen=True, kw_only=True)
class Lever:
    name: str
    overrides: tuple[str, ...]
    ranks: int = 1
    """Fewest data-parallel ranks on which it has an effect."""
    cuda_only: bool = False


def selective(name: str, modules: str) -> Lever:
    return Lever(name=f"recompute {name}", overrides=("model.recompute=selective", f"model.recompute_modules=[{modules}]"))


def levers(tokens: int) -> dict[str, Lever]:
    """By the name that `--only` takes."""
    return {
        "none": Lever(name="none", overrides=()),
        "attention": selective("attention", "attention"),
        "mlp": selective("mlp (router and experts)", "mlp"),
        "norms": selective("norms", "norms"),
        "all-parts": selective("attention, mlp, norms", "attention,mlp,norms"),
        "full": Lever(name="recompute full", overrides=("model.recompute=full",)),
        "half": Lever(name="half the `micro_batch_tokens`", overrides=(f"trainer.micro_batch_tokens={tokens // 2}",)),
        "chunk": Lever(name="`vocab_chunk_bytes` 16 MiB", overrides=("trainer.vocab_chunk_bytes=16777216",)),
        "distributed": Lever(name="distributed optimizer", overrides=("parallel.distributed_optimizer=true",), ranks=2),
        "overlap": Lever(name="overlapped gradients, one bucket", overrides=("parallel.overlap_gradients=true",), ranks=2),
        "buckets": Lever(name="overlapped gradients, buckets of 1M",
                         overrides=("parallel.overlap_gradients=true", "parallel.gradient_bucket_parameters=1000000"), ranks=2),
        "offload": Lever(name="moments in host memory", overrides=("optimizer.offload=true",), cuda_only=True),
        "sequential": Lever(name="experts one after the other", overrides=("model.grouped_experts=sequential",), cuda_only=True),
    }


# --- one rank ---


def measure(checkpoint: str, output: Path, given: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Writes this rank's peak and held bytes, and its seconds of a step."""
    import torch
    import torch.distributed as dist

    from megatron_antisd.compat import megatron_cpu
    from megatron_antisd.compat.quiet import quiet_libraries
    from megatron_antisd.config import load_config
    from megatron_antisd.parallel.layout import build_layout, start_process_group

    quiet_libraries()
    base = output.parent / "config.yaml"
    config = load_config(base, [f"model.path={checkpoint}", *overrides])
    start_process_group(300)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=0)
    description = describe(checkpoint, layout.tensor_size)
    gauge = _CudaGauge() if given.device == "cuda" else _ProcessGauge()
    before = gauge.held()
    trainer = Trainer(config, layout, description)
    batch = make_batch(ROWS * 2 * layout.data_size, given.tokens // 2, given.vocab)
    trainer.step(batch, 1e-4)  # makes the moments
    held = gauge.held() - before
    gauge.restart()
    clock, own = zip(*(_timed(trainer, batch) for _ in range(given.steps)), strict=True)
    found = {"peak": gauge.peak() - before, "held": held, "seconds": min(clock), "own": min(own)}
    output.with_suffix(f".{layout.rank}.json").write_text(json.dumps(found))
    if torch.distributed.get_world_size() > 1:
        dist.barrier()
    dist.destroy_process_group()


def make_batch(sequences: int, length: int, vocab: int) -> TrainingBatch:
    """Random sequences of `length` tokens, an eighth of them prompt."""
    import torch

    from megatron_antisd.records import ScoringView, TrainingBatch

    generator = torch.Generator().manual_seed(0)
    prompt = length // 8
    rows = torch.randint(0, vocab, (sequences, length), generator=generator).tolist()
    views = tuple(ScoringView(prompt_ids=tuple(row[:prompt]), response_ids=tuple(row[prompt:])) for row in rows)
    total = sequences * (length - prompt)
    uniform = torch.full((total,), -math.log(vocab))
    return TrainingBatch(
        views=views, sequence_advantage=torch.randn(sequences, generator=generator), sequence_mask=torch.ones(sequences, dtype=torch.bool),
        teacher_log_prob=uniform + 0.1 * torch.randn(total, generator=generator), teacher_mask=torch.ones(total, dtype=torch.bool),
        old_log_prob=None, engine_log_prob=uniform, lambda_=0.5, tokens=total)


def _timed(trainer: Trainer, batch: TrainingBatch) -> tuple[float, float]:
    """Seconds of a step by the clock, and of this process's own time."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    start, own = time.perf_counter(), time.process_time()
    stats = trainer.step(batch, 1e-4)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if stats.skipped:
        raise RuntimeError(f"the step was skipped: loss {stats.loss}, gradient norm {stats.grad_norm}")
    return time.perf_counter() - start, time.process_time() - own


class _ProcessGauge:
    """Resident bytes of this process."""

    def held(self) -> int:
        return self._read("VmRSS")

    def peak(self) -> int:
        return self._read("VmHWM")

    def restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now

    @staticmethod
    def _read(key: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


class _CudaGauge:
    """Bytes that torch's allocator has handed out."""

    def held(self) -> int:
        import torch

        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated()

    def restart(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()


# --- all of them ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    parser = _parser()
    given, overrides = parser.parse_known_args(arguments)
    if given.measure:
        measure(given.measure, given.output / "result", given, overrides)
        return 0
    if overrides:
        parser.error(f"unknown arguments: {' '.join(overrides)}")
    checkpoint = _prepare(given)
    ranks = 1 if given.device == "cuda" else 2
    known = {key: lever for key, lever in levers(given.tokens).items()
             if ranks >= lever.ranks and (given.device == "cuda" or not lever.cuda_only)}
    wanted = list(known) if given.only is None else given.only.split(",")
    absent = [key for key in wanted if key not in known]
    if absent:
        raise SystemExit(f"--only: {', '.join(absent)} cannot be measured with {ranks} rank(s) on {given.device}; there are {', '.join(known)}")
    chosen = {key: known[key] for key in wanted}
    if "none" not in chosen:
        raise SystemExit(f"--only must name none, which the others are compared with, and any of {', '.join(known)}; got {given.only}")
    print(f"{machine()}; {given.device}, {ranks} rank{'s' * (ranks > 1)}; {given.layers} layers, hidden {given.hidden}, {given.experts} experts, "
          f"2 active, vocabulary {given.vocab}; {ROWS} rows of {given.tokens} tokens a rank and step\n", flush=True)
    found: dict[str, list[dict[str, float]]] = {key: [] for key in chosen}
    for _ in range(given.rounds):
        for key, lever in chosen.items():
            found[key].append(_one_round(checkpoint, lever, ranks, given))
            print(f"  {key}: {found[key][-1]}", file=sys.stderr, flush=True)
    best = {key: {figure: min(one[figure] for one in rounds) for figure in rounds[0]} for key, rounds in found.items()}
    _print(best, chosen)
    return 0


def _print(best: dict[str, dict[str, float]], chosen: dict[str, Lever]) -> None:
    none = best["none"]
    print("| lever | peak, MB | saved against none, MB | held between steps, MB | seconds of a step | to none | processes' own time to none |\n"
          "|---|---:|---:|---:|---:|---:|---:|")
    for key, row in best.items():
        print(f"| {chosen[key].name} | {row['peak'] / 1e6:.0f} | {round((none['peak'] - row['peak']) / 1e6)} | {row['held'] / 1e6:.0f} | "
              f"{row['seconds']:.2f} | {row['seconds'] / none['seconds']:.2f} | {row['own'] / none['own']:.2f} |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("hidden", 256), ("experts", 8), ("tokens", 4096), ("vocab", 8192), ("rounds", 2), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="levers, comma-separated")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/benchmarks/memory")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser


def _prepare(given: argparse.Namespace) -> Path:
    import yaml

    from examples.tiny_checkpoint import Shape, make_tiny_checkpoint

    shutil.rmtree(given.output, ignore_errors=True)
    heads = given.hidden // 64
    shape = Shape(layers=given.layers, hidden=given.hidden, heads=heads, key_value_heads=max(1, heads // 2), experts=given.experts,
                  intermediate=given.hidden, context=given.tokens)
    checkpoint = make_tiny_checkpoint(given.output / "model", shape=shape, vocab_size=given.vocab)
    config = {"model": {"dtype": "bfloat16" if given.device == "cuda" else "float32"}, "data": {"train": ["none"]},
              "parallel": {"distributed_optimizer": False}, "trainer": {"micro_batch_tokens": given.tokens}}
    (given.output / "config.yaml").write_text(yaml.safe_dump(config))
    return checkpoint


def _one_round(checkpoint: Path, lever: Lever, ranks: int, given: argparse.Namespace) -> dict[str, float]:
    """The largest peak of the ranks, and the slowest rank's fastest step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.memory",
               "--measure", str(checkpoint), "--output", str(given.output), "--device", given.device, "--tokens", str(given.tokens),
               "--vocab", str(given.vocab)]

    def taken(prefix: Sequence[str], steps: int) -> list[dict[str, float]]:
        run([*prefix, *command, "--steps", str(steps), *lever.overrides], threads=1)
        return [json.loads((given.output / f"result.{rank}.json").read_text()) for rank in range(ranks)]

    timed = taken((), given.steps)
    weighed = timed if given.device == "cuda" else taken(SMALL_BLOCKS, 1)
    return {figure: max(rank[figure] for rank in (weighed if figure in ("peak", "held") else timed)) for figure in timed[0]}


if __name__ == "__main__":
    sys.exit(main())
