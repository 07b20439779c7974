"""Bytes and memory of a weight sync into the engines of the trainer's own processes: `python -m benchmarks.weight_sync`.

Bytes: for each trainer layout, to engines of tensor-parallel size 1 and 2, real ranks (gloo) run the sync's plan; received messages are counted, and
every tensor is compared with the checkpoint's. The least possible for a rank is what its engine needs, less what it holds.

Memory: TP2 x PP2 x EP2 on four ranks with a vLLM in each. How far the resident memory of a rank rises during a sync (the worst of three after a
first one) over what it was before: two parts on their way, a module that vLLM builds and packs anew, and all else.

Goals, on every rank: at most 1.1 times the least, at most 3 buckets.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import machine, run

BYTES_GOAL, BUCKETS_GOAL = 1.1, 3.0
BUCKET = 32 << 20
BYTES_BUCKET = 1 << 20
ENGINES = (1, 2)
TARGET = "TP2 PP2 EP2"
LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
    TARGET: ("moe", 4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "TP2 PP2 EP2 ETP2": ("moe", 8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 2,
                                    "expert_tensor_parallel_size": 2}),
    "TP2 PP2 EP4 ETP1": ("moe", 8, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 4,
                                    "expert_tensor_parallel_size": 1}),
    "TP2": ("moe", 2, {"tensor_parallel_size": 2}),
    "TP2 EP2": ("moe", 2, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    "EP4": ("moe", 4, {"expert_parallel_size": 4}),
    "PP2 EP2": ("moe", 4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
    "TP2 PP2 VPP2": ("moe", 4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "virtual_pipeline_size": 2}),
    "TP2 EP2 ETP2": ("moe", 4, {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 2}),
    "TP2 CP2": ("moe", 4, {"tensor_parallel_size": 2, "context_parallel_size": 2}),
    "PP2, tied embedding": ("tied", 2, {"pipeline_parallel_size": 2}),
    "PP4, tied embedding": ("tied", 4, {"pipeline_parallel_size": 4}),
}


def trainer_ranks(config: Any) -> tuple[Any, Any, Any]:
    """(chunks, description, layout) of this rank, with the checkpoint's weights. After the process group and the engine."""
    from megatron_antisd.compat import megatron_cpu

    megatron_cpu.install()
    from megatron_antisd.models.build import build_model, describe
    from megatron_antisd.parallel.layout import build_layout
    from megatron_antisd.parallel.reshard import load_huggingface

    layout = build_layout(config.parallel, seed=0)
    description = describe(config.model.path, layout.tensor_size)
    chunks = build_model(description, config.model, config.parallel)
    load_huggingface(chunks, description, layout, config.model.path)
    return chunks, description, layout


def configuration(checkpoint: str, parallel: Mapping[str, int], dtype: str, bucket: int, engine: int = 1) -> Any:
    from megatron_antisd.config import build_config

    return build_config({
        "model": {"path": checkpoint, "dtype": dtype}, "data": {"train": ["none"]}, "parallel": dict(parallel),
        "rollout": {"tensor_parallel_size": engine, "sync_bucket_bytes": bucket, "max_context": 256, "max_sequences": 4,
                    "kv_cache_bytes": 16 << 20}})


def count_bytes(checkpoint: str, parallel: Mapping[str, int], output: Path) -> None:
    """One rank: received bytes of a sync for each size of engine, and the least possible."""
    import torch.distributed as dist

    from megatron_antisd.models.huggingface import HuggingfaceCheckpoint
    from megatron_antisd.parallel.layout import start_process_group

    start_process_group(60)
    chunks, description, layout = trainer_ranks(configuration(checkpoint, parallel, "bfloat16", BYTES_BUCKET))
    from megatron_antisd.parallel.placement import EngineLayout
    from megatron_antisd.parallel.weight_sender import WeightSender
    from megatron_antisd.wire.transports import TrainerGroup

    received = 0

    class Counting(TrainerGroup):
        def exchange(self, sends: Any, receives: Any) -> Any:
            nonlocal received
            received += sum(tensor.nbytes for tensor in receives.values())
            return super().exchange(sends, receives)

    import megatron_antisd.parallel.weight_sender as module

    module.TrainerGroup = Counting
    sender, reader = WeightSender(chunks, description, layout, bucket_bytes=BYTES_BUCKET), HuggingfaceCheckpoint(checkpoint)
    found = {}
    for engine in ENGINES:
        received = 0
        compare(sender.stream(EngineLayout(tensor_size=engine)), reader, set(description.huggingface_shapes()))
        planned = sender._planned(EngineLayout(tensor_size=engine), inside=True)
        found[engine] = {"received": received, "least": least(planned.plan, layout.rank), "sent": sum(m.size for p in planned.outgoing for m in p)}
    output.with_suffix(f".{layout.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compare(stream: Iterator[tuple[str, Any]], reader: Any, expected: set[str]) -> None:
    """Every tensor, or what came of it, with the checkpoint."""
    import torch

    from megatron_antisd.wire.boxes import Box, HeldPart

    names = set()
    for name, tensor in stream:
        full = reader.read(name).to(tensor.dtype)
        part, box = tensor.held() if isinstance(tensor, HeldPart) else (tensor.view(tensor.shape[0], -1), Box.whole(tensor.shape))
        matrix = full.view(full.shape[0], -1)
        if tensor.shape != full.shape or not torch.equal(part, Box.whole(full.shape).cut(matrix, box)):
            raise RuntimeError(f"{name}: what came is not the checkpoint's")
        names.add(name)
    if names != expected:
        raise RuntimeError(f"missing or unknown: {sorted(names ^ expected)[:5]}")


def least(plan: Any, rank: int) -> int:
    """Bytes that the engine of this rank needs and the rank does not hold."""
    total = 0
    for tensor in plan.tensors.values():
        need = tensor.needs[rank % plan.engine.tensor_size]
        own = [need.overlap(holding.box) for holding in tensor.holdings if rank in holding.ranks] if need else []
        total += ((need.numel if need else 0) - sum(box.numel for box in own if box)) * tensor.itemsize
    return total


def measure_memory(checkpoint: str, parallel: Mapping[str, int], engine_size: int, output: Path) -> None:
    """One rank, with vLLM: rise of its resident memory during the second sync, in bytes."""
    import torch.distributed as dist

    from megatron_antisd.parallel.layout import start_process_group
    from megatron_antisd.rollout.vllm_engine import VllmEngine

    config = configuration(checkpoint, parallel, "float32", BUCKET, engine_size)
    start_process_group(600)
    engine = VllmEngine(checkpoint, rollout=config.rollout, dtype="float32", max_context=256, load_format="dummy", timeout_seconds=600)
    chunks, description, layout = trainer_ranks(config)
    from megatron_antisd.parallel.engine_weights import EngineWeights

    weights = EngineWeights(config, chunks, description, layout)
    problems, rises = [], []
    for version in range(4):
        gc.collect()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        names = weights.sample(version)
        checksums = engine.load_weights(weights.stream(), version, names)
        rises.append(resident("VmHWM") - before)
        problems += weights.problems(names, version, checksums)
    modules: dict[Any, int] = {}
    from megatron_antisd.parallel.placement import module_of

    module = {name: module_of(entry) for entry in description.entries() for name in entry.huggingface}
    plan = weights._sender._planned(weights._engine, inside=True).plan
    for tensor in plan.tensors.values():
        need = tensor.needs[layout.rank % engine_size]
        modules[module[tensor.name]] = modules.get(module[tensor.name], 0) + (need.numel * tensor.itemsize if need else 0)
    output.with_suffix(f".{layout.rank}.json").write_text(json.dumps(
        {"rise": max(rises[1:]), "problems": problems, "parts": len(plan.parts), "module": max(modules.values())}))
    engine.close()
    dist.barrier()
    dist.destroy_process_group()


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) << 10


def launch(ranks: int, arguments: Sequence[str], result: Path) -> list[dict[str, Any]]:
    # Large blocks go back to the system at once, so that resident memory is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"], os.environ["MALLOC_TRIM_THRESHOLD_"] = str(256 << 10), str(256 << 10)
    run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.weight_sync",
         "--output", str(result), *arguments], threads=1)
    return [json.loads(result.with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]


def bytes_table(folder: Path) -> float:
    """Prints; the worst ratio of any rank."""
    print("| trainer | engine | ranks | least, all ranks, MB | received, MB | ratio | worst rank | most sent by a rank, of the mean |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    worst = 0.0
    for name, (kind, ranks, _) in LAYOUTS.items():
        rows = launch(ranks, ["--count", str(folder / kind), name], folder / "counts")
        for engine in map(str, ENGINES):
            received, least_, sent = ([row[engine][key] for row in rows] for key in ("received", "least", "sent"))
            each = max(r / n if n else float(r > 0) for r, n in zip(received, least_, strict=True))
            worst = max(worst, each)
            balance = max(sent) * ranks / sum(sent) if sum(sent) else 1.0
            print(f"| {name} | TP{engine} | {ranks} | {sum(least_) / 1e6:.2f} | {sum(received) / 1e6:.2f} | "
                  f"{sum(received) / max(1, sum(least_)):.3f} | {each:.3f} | {balance:.2f} |", flush=True)
    return worst


def memory_table(folder: Path) -> float:
    """Prints; the most buckets of any rank."""
    print("\n| trainer | engine | bucket, MB | parts | largest module, MB | memory's rise, worst rank, MB | buckets |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    most = 0.0
    for engine in ENGINES:
        rows = launch(LAYOUTS[TARGET][1], ["--memory", str(folder / "large"), str(engine)], folder / "memory")
        if any(row["problems"] for row in rows):
            raise RuntimeError(f"the engines do not hold the trainer's weights: {rows[0]['problems'][:3]}")
        rise = max(row["rise"] for row in rows)
        most = max(most, rise / BUCKET)
        print(f"| {TARGET} | TP{engine} | {BUCKET / 1e6:.1f} | {rows[0]['parts']} | {rows[0]['module'] / 1e6:.1f} | {rise / 1e6:.1f} | "
              f"{rise / BUCKET:.2f} |", flush=True)
    return most


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/weight_sync"))
    parser.add_argument("--only", choices=["bytes", "memory"], help="one of the two tables; `bytes` needs no vLLM")
    parser.add_argument("--count", nargs=2, metavar=("CHECKPOINT", "LAYOUT"), help=argparse.SUPPRESS)
    parser.add_argument("--memory", nargs=2, metavar=("CHECKPOINT", "ENGINE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.count:
        count_bytes(given.count[0], LAYOUTS[given.count[1]][2], given.output)
        return 0
    if given.memory:
        measure_memory(given.memory[0], LAYOUTS[TARGET][2], int(given.memory[1]), given.output)
        return 0
    from examples.tiny_checkpoint import Shape, make_tiny_checkpoint

    shutil.rmtree(given.output, ignore_errors=True)
    for kind in ("moe", "tied"):
        shape = Shape(hidden=256, head_dim=64, experts=8 if kind == "moe" else 0, intermediate=256, context=512, tied=kind == "tied")
        make_tiny_checkpoint(given.output / kind, shape=shape, vocab_size=544)
    make_tiny_checkpoint(given.output / "large", vocab_size=8192, shape=Shape(
        hidden=512, head_dim=64, experts=8, intermediate=320, context=512, layers=8))
    print(f"{machine()}\n")
    worst = 0.0 if given.only == "memory" else bytes_table(given.output)
    most = 0.0 if given.only == "bytes" else memory_table(given.output)
    return int(worst > BYTES_GOAL or most > BUCKETS_GOAL)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
