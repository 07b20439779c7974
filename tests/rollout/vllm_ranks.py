"""Two ranks, one import of vLLM, several engines one after another; findings go to stdout as one JSON line a rank."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from finished import reported
from quotas import quota_facts
from tiny_models import CONTEXT, VOCAB, log_probs, make_model, save

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import EngineError, Generation, Quota, Request, Sampling
from megatron_antisd.rollout.vllm_engine import VllmEngine

STOPS = tuple(range(0, VOCAB, 8))  # so many that these random models draw one now and then
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, stop_token_ids=STOPS)
FIXED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, ignore_eos=True)
LONG_PROMPT = 300  # two full KV blocks of 128 tokens and a rest


def make_requests(count: int, *, length: int, seed: int = 0) -> list[Request]:
    """`count` requests in groups of 2 that share a prompt."""
    generator = torch.Generator().manual_seed(length)
    prompts = torch.randint(3, VOCAB, ((count + 1) // 2, length), generator=generator).tolist()
    return [Request(prompt_ids=tuple(prompts[i // 2]), seed=seed + i) for i in range(count)]


def mean_difference(model: Any, requests: Sequence[Request], generations: Sequence[Generation], temperature: float = 1.0) -> float:
    """Mean |engine - transformers| log-prob over all response tokens, nats."""
    differences = [
        (log_probs(model, request.prompt_ids, generation.response_ids, temperature) - torch.tensor(generation.log_probs)).abs()
        for request, generation in zip(requests, generations, strict=True)
    ]
    return float(torch.cat(differences).mean())


def error_of(call: Any) -> str:
    try:
        call()
    except EngineError as error:
        return str(error)
    return ""


def start(path: Path, tensor_parallel: int) -> VllmEngine:
    rollout = RolloutConfig(tensor_parallel_size=tensor_parallel, max_context=CONTEXT, max_sequences=16, kv_cache_bytes=64 << 20)
    return VllmEngine(path, rollout=rollout, dtype="float32", timeout_seconds=60)


def process_state() -> tuple[Any, ...]:
    return (torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("LD_PRELOAD"), torch.random.get_rng_state().tolist())


def sampling_facts(engine: VllmEngine, model: Any) -> dict[str, Any]:
    requests = make_requests(7, length=9)
    first, again = engine.generate(requests, SAMPLING), engine.generate(requests, SAMPLING)
    other = engine.generate([Request(prompt_ids=r.prompt_ids, seed=r.seed + 1000) for r in requests], SAMPLING)
    order = engine.generate(requests[::-1], SAMPLING)[::-1]
    fixed = engine.generate(make_requests(24, length=5), FIXED)
    stopping = engine.generate(make_requests(24, length=5), SAMPLING)
    cool = Sampling(temperature=0.5, top_p=1.0, max_new_tokens=12, ignore_eos=True)
    nucleus = Sampling(temperature=1.0, top_p=0.5, max_new_tokens=12, ignore_eos=True)
    generations, told, calls = reported(engine.generate, requests, SAMPLING)
    return {
        "each_is_reported_once": sorted(told) == [(i, g.response_ids) for i, g in enumerate(generations)] and generations == first,
        "reported_while_decoding": min(calls) > 2,
        "same_seed_same_tokens": first == again,
        "other_seed_other_tokens": sum(a.response_ids != b.response_ids for a, b in zip(first, other, strict=True)),
        "order_kept": all(a.response_ids == b.response_ids for a, b in zip(first, order, strict=True)),
        "group_differs": first[0].response_ids != first[1].response_ids,
        "fixed_lengths": sorted({len(g.response_ids) for g in fixed}),
        "fixed_truncated": all(g.truncated for g in fixed),
        "cut_at_stop": all(_until_stop(f, s) for f, s in zip(fixed, stopping, strict=True)),
        "stopped": sum(not g.truncated for g in stopping),
        "few": len(engine.generate(requests[:1], SAMPLING)),
        "none": len(engine.generate([], SAMPLING)),
        "cool": mean_difference(model, requests, engine.generate(requests, cool), temperature=0.5),
        "nucleus_max": max(max(g.log_probs) for g in engine.generate(requests, nucleus)),
        "nucleus_gain": _nucleus_gain(model, requests, engine.generate(requests, nucleus)),
        "too_long": error_of(lambda: engine.generate([*requests, Request(prompt_ids=(5,) * 501, seed=0)], SAMPLING)),
        "foreign_id": error_of(lambda: engine.generate([Request(prompt_ids=(5, VOCAB), seed=0)], SAMPLING)),
        "quota": quota_facts(engine, make_requests(24, length=5), SAMPLING, Quota(groups=3, group_size=4)),
        "usable_after_refusal": engine.generate(requests, SAMPLING) == first,
    }


def _until_stop(fixed: Generation, stopped: Generation) -> bool:
    """With the same seed, the response that may stop is the fixed one cut after its first stop token."""
    end = next((i + 1 for i, token in enumerate(fixed.response_ids) if token in STOPS), None)
    return stopped.response_ids == fixed.response_ids[:end] and stopped.truncated == (end is None)


def _nucleus_gain(model: Any, requests: Sequence[Request], generations: Sequence[Generation]) -> float:
    """How much higher a log-prob is inside the nucleus of half the mass than over all ids; at least 0, at most log 2 + rounding."""
    full = torch.cat([log_probs(model, r.prompt_ids, g.response_ids) for r, g in zip(requests, generations, strict=True)])
    inside = torch.tensor([value for g in generations for value in g.log_probs])
    return float((inside - full).mean())


def update_facts(engine: VllmEngine, old: Any, new: Any, old_tensors: dict[str, Any], new_tensors: dict[str, Any]) -> dict[str, Any]:
    """Weight updates under a shared prompt of more than one KV block, and the failures that would be silent."""
    requests = make_requests(4, length=LONG_PROMPT)
    facts: dict[str, Any] = {"before": mean_difference(old, requests, engine.generate(requests, FIXED))}
    begin = time.perf_counter()
    engine.load_weights(iter(new_tensors.items()), version=1)
    facts["load_seconds"] = time.perf_counter() - begin
    generations = engine.generate(requests, FIXED)
    facts["after_vs_new"] = mean_difference(new, requests, generations)
    facts["after_vs_old"] = mean_difference(old, requests, generations)
    facts["version"] = engine.policy_version
    # Without the reset: the prompt's blocks stay those of the weights before.
    reset, engine._replica._llm.reset_prefix_cache = engine._replica._llm.reset_prefix_cache, lambda: True
    engine.load_weights(iter(old_tensors.items()), version=2)
    facts["stale_cache"] = mean_difference(old, requests, engine.generate(requests, FIXED))
    engine._replica._llm.reset_prefix_cache = reset
    engine.load_weights(iter(new_tensors.items()), version=3)
    facts["after_again"] = mean_difference(new, requests, engine.generate(requests, FIXED))
    return facts


def without_expert_repair(
    engine: VllmEngine, old: Any, new: Any, old_tensors: dict[str, Any], new_tensors: dict[str, Any],
) -> dict[str, Any]:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    requests = make_requests(4, length=20)
    repaired = Method._setup_kernel
    Method._setup_kernel = repaired.__wrapped__
    engine.load_weights(iter(old_tensors.items()), version=4)
    facts = {"unpacked_experts": mean_difference(old, requests, engine.generate(requests, FIXED))}
    Method._setup_kernel = repaired
    engine.load_weights(iter(new_tensors.items()), version=5)
    facts["repaired"] = mean_difference(new, requests, engine.generate(requests, FIXED))
    return facts


def failure_facts(engine: VllmEngine, tensors: dict[str, Any]) -> dict[str, Any]:
    """What goes wrong goes wrong on every rank, at once. A failed engine refuses to go on; here it is made to, to fail again."""
    facts: dict[str, Any] = {
        "disagreement": error_of(lambda: engine.generate(make_requests(2, length=4, seed=dist.get_rank()), FIXED))}
    if dist.get_rank() == 1:  # vLLM raises in the middle of a run, on one rank alone
        step, count = engine._replica._llm.llm_engine.step, iter(range(100))

        def failing_step() -> Any:
            if next(count) == 3:
                raise RuntimeError("out of something")
            return step()

        engine._replica._llm.llm_engine.step = failing_step
    begin = time.perf_counter()
    facts["one_rank"] = error_of(lambda: engine.generate(make_requests(6, length=9), FIXED))
    facts["one_rank_seconds"] = time.perf_counter() - begin
    facts["later"] = error_of(lambda: engine.generate(make_requests(6, length=9), FIXED))

    read: list[str] = []

    def stream(items: dict[str, Any]) -> Any:
        for name, tensor in items.items():
            read.append(name)
            yield name, tensor

    norm = "model.norm.weight"
    for case, items in {
        "unknown": {"model.surprise": torch.ones(1), **tensors},
        "missing": {name: tensor for name, tensor in tensors.items() if name != norm},
        "shape": {**tensors, norm: torch.ones(7)},
    }.items():
        engine._failure = ""
        read.clear()
        facts[case] = error_of(lambda items=items: engine.load_weights(stream(items), version=9))
        facts[f"{case}_left_unread"] = len(items) - len(read)
    facts["version"] = engine.policy_version
    return facts


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    models = {(family, seed): make_model(family, seed) for family in ("dense", "moe") for seed in (0, 1)}
    paths = {key: folder / f"{key[0]}{key[1]}" for key in models}
    if rank == 0:
        for key, model in models.items():
            save(model, paths[key])
    dist.barrier()
    from safetensors.torch import load_file

    tensors = {key: load_file(path / "model.safetensors") for key, path in paths.items()}
    before = process_state()
    facts: dict[str, Any] = {}
    for family, tensor_parallel in (("dense", 1), ("dense", 2), ("moe", 1), ("moe", 2)):
        engine = start(paths[family, 0], tensor_parallel)
        arguments = (engine, models[family, 0], models[family, 1], tensors[family, 0], tensors[family, 1])
        found = facts[f"{family}_tp{tensor_parallel}"] = {}
        if (family, tensor_parallel) in (("dense", 1), ("moe", 2)):
            found["sampling"] = sampling_facts(engine, models[family, 0])
        found["update"] = update_facts(*arguments)
        if family == "moe":
            found["experts"] = without_expert_repair(*arguments)
        if (family, tensor_parallel) == ("moe", 1):
            found["failures"] = failure_facts(engine, tensors["moe", 0])
        engine.close()
    facts["state_kept"] = process_state() == before
    one = torch.ones(1)
    dist.all_reduce(one)  # the trainer's group outlives every engine
    facts["group_alive"] = one.item()
    # Not through the output that the ranks share: two long lines can mix there.
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
