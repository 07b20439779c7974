"""One process, no launcher: the engine from random weights, in bfloat16 and beside Megatron's CPU support; groups of rollouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import CONTEXT, VOCAB, log_probs, make_model, save

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import RolloutConfig
from megatron_antisd.records import Problem
from megatron_antisd.rollout.engine import EngineError, Request, Sampling
from megatron_antisd.rollout.groups import generate_groups
from megatron_antisd.rollout.vllm_engine import VllmEngine


def start(path: Path, dtype: Any, load_format: Any = "auto") -> VllmEngine:
    return VllmEngine(path, rollout=RolloutConfig(max_context=CONTEXT, max_sequences=16, kv_cache_bytes=64 << 20), dtype=dtype,
                      load_format=load_format, policy_version=3)


def full_cache(folder: Path) -> dict[str, Any]:
    """12 sequences of 400 tokens where the cache has blocks for two: vLLM gives sequences up and computes them again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    given_up, give_up = [], Scheduler._preempt_request

    def counted(self: Scheduler, *arguments: Any, **options: Any) -> Any:
        given_up.append(1)
        return give_up(self, *arguments, **options)

    Scheduler._preempt_request = counted
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=300, ignore_eos=True, routes=True)
    requests = [Request(prompt_ids=tuple(5 + (i + j) % 100 for j in range(100)), seed=i) for i in range(12)]
    found, counts = [], []
    for size in (64 << 20, 1 << 20):
        given_up.clear()
        engine = VllmEngine(folder, rollout=RolloutConfig(max_context=CONTEXT, max_sequences=16, kv_cache_bytes=size), dtype="float32", routes=True)
        found.append(engine.generate(requests, sampling))
        counts.append(len(given_up))
        engine.close()
    roomy, tight = found
    difference = [abs(a - b) for one, other in zip(roomy, tight, strict=True) for a, b in zip(one.log_probs, other.log_probs, strict=True)]
    return {"given_up": counts, "same_tokens": [g.response_ids for g in roomy] == [g.response_ids for g in tight], "difference": max(difference),
            "same_routes": [g.routes for g in roomy] == [g.routes for g in tight]}


def layers_left() -> list[str]:
    """Of engines that are closed."""
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    return [type(layer).__name__ for layer in LAYERWISE_INFO]


def main(folder: Path) -> None:
    model = make_model("moe", 0)
    tensors = save(model, folder)
    try:
        VllmEngine(folder, rollout=RolloutConfig(tensor_parallel_size=2), dtype="float32")
    except EngineError as error:
        facts: dict[str, Any] = {"too_many": str(error)}
    engine = start(folder, "float32", "dummy")
    megatron_cpu.install()  # the trainer's order: engine first
    engine.load_weights(iter(tensors.items()), version=4)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=10, stop_token_ids=(2,))
    problems = [Problem(id=name, prompt="", answer="") for name in ("a", "b", "a")]
    prompts = [(5, 6, 7), tuple(range(3, VOCAB)) * 2, (5, 6, 7)]
    arguments: dict[str, Any] = dict(sampling=sampling, group_size=4, seed=1, decode=lambda ids: " ".join(map(str, ids)))
    groups = generate_groups(engine, problems, prompts, step=0, **arguments)
    again = generate_groups(engine, problems, prompts, step=0, **arguments)
    later = generate_groups(engine, problems, prompts, step=1, **arguments)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    difference = torch.cat([(log_probs(model, r.prompt_ids, r.response_ids) - torch.tensor(r.engine_log_probs)).abs() for r in rollouts])
    facts |= {
        "difference": float(difference.mean()),
        "ids": [group.problem.id for group in groups],
        "indices": [[r.index for r in group.rollouts] for group in groups],
        "prompts_kept": all(r.prompt_ids == prompt for group, prompt in zip(groups, prompts, strict=True) for r in group.rollouts),
        "versions": sorted({r.policy_version for r in rollouts}),
        "texts": all(r.text == " ".join(map(str, r.response_ids)) for r in rollouts),
        "repeatable": groups == again,
        "new_each_step": sum(a != b for a, b in zip(groups, later, strict=True)),
        "distinct": len({r.response_ids for r in rollouts}),
    }
    engine.sleep()
    engine.wake()
    engine.close()
    engine.close()
    facts["layers_left"] = layers_left()
    facts["group_left"] = dist.is_initialized()
    engine = start(folder, "bfloat16")
    groups = generate_groups(engine, problems, prompts, step=0, **arguments)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    difference = torch.cat([(log_probs(model, r.prompt_ids, r.response_ids) - torch.tensor(r.engine_log_probs)).abs() for r in rollouts])
    facts["bfloat16"] = float(difference.mean())
    engine.load_weights(iter(tensors.items()), version=4)
    facts["bfloat16_same_after_reload"] = [g.rollouts[0].response_ids for g in groups] == [
        g.rollouts[0].response_ids for g in generate_groups(engine, problems, prompts, step=0, **arguments)]
    engine.close()
    facts["full_cache"] = full_cache(folder)
    print("FACTS " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
