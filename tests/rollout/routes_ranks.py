"""Two ranks: vLLM's routes as one engine and as two, against transformers' routers; findings go to a file of each rank.

Usage: routes_ranks.py FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import VOCAB, make_model, save
from vllm_ranks import error_of, make_requests

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import Generation, Request, Sampling
from megatron_antisd.rollout.vllm_engine import VllmEngine

LONG, CONTEXT = 300, 512  # two full KV blocks of 128 tokens and a rest
ROUTED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, ignore_eos=True, routes=True)
PLAIN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, ignore_eos=True)


@torch.no_grad()
def router_sets(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, layers, top_k] of transformers, each set in order."""
    found: list[torch.Tensor] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: found.append(outputs[2])) for layer in model.model.layers]
    model(torch.tensor([list(ids)]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, dim=1).sort(-1).values


def others(model: Any, requests: Sequence[Request], generations: Sequence[Generation]) -> int:
    """Tokens and layers where the engine went to another set than transformers' routers choose."""
    count = 0
    for request, generation in zip(requests, generations, strict=True):
        expected = router_sets(model, [*request.prompt_ids, *generation.response_ids[:-1]])
        got = torch.from_numpy(generation.routes.array()).long().sort(-1).values
        assert got.shape == expected.shape, f"{got.shape} {expected.shape}"
        count += int((got != expected).any(-1).sum())
    return count


def start(path: Path, tensor_parallel: int, **settings: Any) -> VllmEngine:
    rollout = RolloutConfig(**{"tensor_parallel_size": tensor_parallel, "max_context": CONTEXT, "max_sequences": 16, "kv_cache_bytes": 64 << 20,
                               **settings})
    return VllmEngine(path, rollout=rollout, dtype="float32", timeout_seconds=60, routes=True)


def engine_facts(engine: VllmEngine, old: Any, new: Any, new_tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    short, long = make_requests(6, length=9), make_requests(6, length=LONG)  # pairs share a prompt: the second one's comes out of the cache
    first, plain = engine.generate(short, ROUTED), engine.generate(short, PLAIN)
    facts: dict[str, Any] = {
        "short": others(old, short, first), "long": others(old, long, engine.generate(long, ROUTED)),
        "cached": others(old, long, engine.generate(long, ROUTED)), "tokens": first[0].routes.tokens, "unasked": [g.routes for g in plain],
        "same_tokens": [g.response_ids for g in first] == [g.response_ids for g in plain],
        "same_again": engine.generate(short, ROUTED) == first,
    }
    # Prefilled alone: what the teacher's own routes are made of.
    one = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1, ignore_eos=True, routes=True)
    whole = [Request(prompt_ids=(*r.prompt_ids, *g.response_ids), seed=0) for r, g in zip(short, first, strict=True)]
    facts["prefilled"] = others(old, whole, engine.generate(whole, one))
    engine.load_weights(iter(new_tensors.items()), version=1)
    after = engine.generate(long, ROUTED)
    facts |= {"after_update": others(new, long, after), "moved": others(old, long, after), "continued": continued(engine, new, short)}
    return facts


def continued(engine: VllmEngine, model: Any, requests: Sequence[Request]) -> int:
    """Responses that are stopped on their way and go on as new requests: their routes cover all rows."""
    replica = engine._replica
    with replica.decoding():
        for index, request in enumerate(requests):
            replica.add(str(index), request, ROUTED)
        for _ in range(4):
            replica.step()
        parts = replica.stop([str(index) for index in range(len(requests))])
    begun = [parts[str(index)].response_ids for index in range(len(requests))]
    rest = [Request(prompt_ids=(*r.prompt_ids, *ids), seed=r.seed) for r, ids in zip(requests, begun, strict=True)]
    return others(model, rest, engine.generate(rest, ROUTED))


def broken_output(engine: VllmEngine, break_it: Any) -> str:
    """The failure where vLLM's outputs are tampered with on their way."""
    step = engine._replica._llm.llm_engine.step

    def tampered() -> Any:
        outputs = step()
        for output in outputs:
            output.outputs[0].routed_experts = break_it(output.outputs[0].routed_experts)
        return outputs

    engine._replica._llm.llm_engine.step = tampered
    try:
        return error_of(lambda: engine.generate(make_requests(2, length=9), ROUTED))
    finally:
        engine._replica._llm.llm_engine.step, engine._failure = step, ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    models = [make_model("moe", seed, layers=3) for seed in (0, 1)]
    if rank == 0:
        for seed, model in enumerate(models):
            save(model, folder / f"moe{seed}")
    dist.barrier()
    from safetensors.torch import load_file

    new_tensors = load_file(folder / "moe1/model.safetensors")
    facts: dict[str, Any] = {}
    engine = start(folder / "moe0", 2)
    facts["engine"] = engine_facts(engine, models[0], models[1], new_tensors)
    facts["none"] = broken_output(engine, lambda routes: None)
    facts["short"] = broken_output(engine, lambda routes: routes[1:])
    engine.close()
    small = start(folder / "moe0", 1, kv_cache_bytes=1 << 20, max_context=400)  # a few blocks: sequences are preempted and computed again
    requests = [Request(prompt_ids=tuple(torch.randint(3, VOCAB, (100,), generator=torch.Generator().manual_seed(i)).tolist()), seed=i)
                for i in range(8)]
    longer = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=60, ignore_eos=True, routes=True)
    facts["preempted"] = others(models[0], requests, small.generate(requests, longer))
    facts["blocks"] = small._replica._llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    small.close()
    facts["threads_left"] = [thread.name for thread in threading.enumerate() if "aux" in thread.name]
    (folder / f"routes_{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
