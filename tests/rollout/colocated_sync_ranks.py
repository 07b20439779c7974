"""Two ranks, trainer and a TP2 vLLM in each: every tensor's checksum after a sync: `colocated_sync_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny import make_olmo3
from tiny_models import make_model, save

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import build_config
from megatron_antisd.parallel.layout import start_process_group
from megatron_antisd.rollout.vllm_engine import VllmEngine

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "moe": ("moe", {"tensor_parallel_size": 2}, {}), "moe, whole experts": ("moe", {"tensor_parallel_size": 2}, {"expert_parallel": True}),
    "olmo3": ("olmo3", {"tensor_parallel_size": 2}, {})}


def main(folder: Path) -> None:
    start_process_group(240)
    rank = dist.get_rank()
    if rank == 0:
        make_olmo3(folder / "olmo3", hidden_size=128)
        save(make_model("moe", 0), folder / "moe")
    dist.barrier()
    configs = {name: build_config({
        "model": {"path": str(folder / model), "dtype": "float32"}, "data": {"train": ["none"]}, "parallel": parallel,
        "sync": {"checksum_tensors": 1000},
        "rollout": {"tensor_parallel_size": 2, "sync_bucket_bytes": 256 << 10, "max_context": 256, "max_sequences": 4, "kv_cache_bytes": 16 << 20,
                    **rollout}}) for name, (model, parallel, rollout) in CASES.items()}
    facts, layout = {}, None
    for name, config in configs.items():
        engine = VllmEngine(config.model.path, rollout=config.rollout, dtype="float32", load_format="dummy", timeout_seconds=240)
        megatron_cpu.install()
        from megatron_antisd.models.build import build_model, describe
        from megatron_antisd.parallel.engine_weights import EngineWeights
        from megatron_antisd.parallel.layout import build_layout
        from megatron_antisd.parallel.reshard import load_huggingface

        layout = layout or build_layout(config.parallel, seed=0)
        description = describe(config.model.path, 2)
        chunks = build_model(description, config.model, config.parallel)
        load_huggingface(chunks, description, layout, config.model.path)
        weights = EngineWeights(config, chunks, description, layout)
        names = weights.sample(1)
        found = engine.load_weights(weights.stream(), 1, names)
        facts[name] = {"names": len(names), "all": len(description.huggingface_shapes()), "problems": weights.problems(names, 1, found),
                       "held": [len(sums) for sums in found]}
        next(iter(chunks[0].parameters())).data.add_(1)  # what the trainer does next is no longer what the engine holds
        facts[name]["after_an_update"] = weights.problems(names, 1, found)
        engine.close()
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
