"""Bytes that a weight sync moves: `python -m benchmarks.weight_sync`.

For each layout, real ranks (gloo or NCCL) stream the policy out as they do for the rollout engine, with every collective's and message's
received bytes counted. The least possible for a rank is the whole policy less what it holds: every engine rank is handed full tensors.

Goal: at most 1.1 times the least, on every rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import machine, run

GOAL = 1.1
LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
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


def count(checkpoint: str, parallel: dict[str, int], output: Path) -> None:
    """One rank: received bytes of a stream, and the least possible."""
    import torch
    import torch.distributed as dist

    from megatron_antisd.compat import megatron_cpu
    from megatron_antisd.config import build_config
    from megatron_antisd.parallel.layout import build_layout, start_process_group

    config = build_config({"model": {"path": checkpoint, "dtype": "bfloat16"}, "data": {"train": ["none"]}, "parallel": parallel})
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import build_model, describe
    from megatron_antisd.parallel.global_tensors import place_shard
    from megatron_antisd.parallel.reshard import WeightStream, load_huggingface, local_weights, tensor_place, tied_copy

    layout = build_layout(config.parallel, seed=0)
    description = describe(checkpoint, layout.tensor_size)
    chunks = build_model(description, config.model, config.parallel)
    load_huggingface(chunks, description, layout, checkpoint)
    received = 0

    def gather(out: torch.Tensor, part: torch.Tensor, *, group: Any) -> None:
        nonlocal received
        received += out.nbytes - part.nbytes
        all_gather(out, part, group=group)

    def hand_on(tensor: torch.Tensor, *, src: int, group: Any) -> None:
        nonlocal received
        received += tensor.nbytes * (src != dist.get_rank())
        broadcast(tensor, src=src, group=group)

    def messages(operations: list[Any]) -> list[Any]:
        nonlocal received
        received += sum(operation.tensor.nbytes for operation in operations if operation.op is dist.irecv)
        return batch(operations)

    stream = WeightStream(chunks, description, layout, config.rollout.sync_bucket_bytes)
    all_gather, broadcast, batch = dist.all_gather_into_tensor, dist.broadcast, dist.batch_isend_irecv
    dist.all_gather_into_tensor, dist.broadcast, dist.batch_isend_irecv = gather, hand_on, messages
    total = sum(tensor.nbytes for _, tensor in stream.stream())
    dist.all_gather_into_tensor, dist.broadcast, dist.batch_isend_irecv = all_gather, broadcast, batch

    held = 0
    copy = tied_copy(chunks, description, layout)
    local = [(entry.weight, parameter) for entry, parameter in local_weights(chunks, description, layout)]
    for weight, parameter in [*local, *([(description.embedding().weight, copy)] if copy is not None else [])]:
        placed = place_shard(parameter.detach(), 0, tuple(parameter.shape), weight.layout, *tensor_place(weight, layout), description.sizes.vocab)
        held += sum(piece.nbytes for piece in placed.pieces.values())
    output.with_suffix(f".{layout.rank}.json").write_text(json.dumps({"received": received, "least": total - held, "total": total}))
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print; 1 when the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/weight_sync"))
    parser.add_argument("--count", nargs=2, metavar=("CHECKPOINT", "LAYOUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.count:
        count(given.count[0], LAYOUTS[given.count[1]][2], given.output)
        return 0
    from examples.tiny_checkpoint import Shape, make_tiny_checkpoint

    shutil.rmtree(given.output, ignore_errors=True)
    for kind in ("moe", "tied"):
        shape = Shape(hidden=256, head_dim=64, experts=8 if kind == "moe" else 0, intermediate=256, context=512, tied=kind == "tied")
        make_tiny_checkpoint(given.output / kind, shape=shape, vocab_size=544)
    print(f"{machine()}\n")
    print("| layout | ranks | policy, MB | least, all ranks, MB | received, MB | ratio | worst rank |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    worst = 0.0
    for name, (kind, ranks, _) in LAYOUTS.items():
        result = given.output / "counts"
        run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.weight_sync",
             "--output", str(result), "--count", str(given.output / kind), name], threads=1)
        rows = [json.loads(result.with_suffix(f".{rank}.json").read_text()) for rank in range(ranks)]
        received, least = (sum(row[key] for row in rows) for key in ("received", "least"))
        each = max(row["received"] / row["least"] for row in rows)
        worst = max(worst, each)
        print(f"| {name} | {ranks} | {rows[0]['total'] / 1e6:.2f} | {least / 1e6:.2f} | {received / 1e6:.2f} | {received / least:.3f} | {each:.3f} |",
              flush=True)
    return int(worst > GOAL)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
