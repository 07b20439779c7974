"""Ranks of the restarts' test: vLLM that fails and hangs in the middle of a generation, at one tensor-parallel size; findings go to a file each.

Usage: restart_ranks.py FOLDER TENSOR_PARALLEL
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from finished import reported
from safetensors.torch import load_file
from tiny_models import CONTEXT, make_model, save

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import Engine, EngineError, Request, Sampling
from megatron_antisd.rollout.restarting import RestartingEngine
from megatron_antisd.rollout.vllm_engine import VllmEngine

STALL_SECONDS = 10.0
FIXED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=12, ignore_eos=True)
REQUESTS = [Request(prompt_ids=(5, 6, 7 + i % 3) * 60, seed=i) for i in range(10)]


def make(folder: Path, tensor_parallel: int, tensors: list[dict[str, Any]]) -> RestartingEngine:
    """Its first weights are the first ones; version v has `tensors[v]`."""
    rollout = RolloutConfig(tensor_parallel_size=tensor_parallel, max_context=CONTEXT, max_sequences=16, kv_cache_bytes=16 << 20,
                            stall_seconds=STALL_SECONDS)

    def build() -> Engine:
        return VllmEngine(folder / "moe0", rollout=rollout, dtype="float32", load_format="dummy", timeout_seconds=30)

    def restore(engine: Engine, version: int) -> None:
        engine.load_weights(iter(tensors[version].items()), version)

    first = build()
    restore(first, 0)
    return RestartingEngine(first, build=build, restore=restore, max_restarts=100)


def fail_in_step(engine: RestartingEngine, number: int, act: Callable[[], Any], *, rank: int | None = None) -> None:
    """In decoding step `number` of the present engine, on one rank or all."""
    if rank not in (None, dist.get_rank()):
        return
    llm = engine._engine._replica._llm.llm_engine
    step, count = llm.step, iter(range(1000))

    def failing_step() -> Any:
        return act() if next(count) == number else step()

    llm.step = failing_step


def die() -> None:
    raise RuntimeError("out of something")


def hang() -> None:
    time.sleep(600)


def wait_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    try:
        lock.acquire()
    except Exception:  # as an engine does that retries whatever it met
        time.sleep(600)


def spin() -> None:
    while True:
        pass


def resources() -> dict[str, int]:
    process = psutil.Process()
    return {"rss": process.memory_info().rss >> 20, "threads": process.num_threads(), "files": process.num_fds(),
            "shared": len(os.listdir("/dev/shm")), "groups": len(dist.distributed_c10d._world.pg_map)}


def facts_of(engine: RestartingEngine, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    undisturbed = engine.generate(REQUESTS, FIXED)
    facts: dict[str, Any] = {"resources": [resources()], "seconds": {}}
    for name, act, rank in (("one dies", die, 1), ("all die", die, None), ("one sleeps", hang, 1), ("one waits", wait_for_a_lock, 0),
                            ("one spins", spin, 1)):
        fail_in_step(engine, 5, act, rank=rank)
        began = time.perf_counter()
        again, told, _ = reported(engine.generate, REQUESTS, FIXED)
        facts["seconds"][name] = time.perf_counter() - began
        counted = engine.take_figures() == {"engine_restarts": 1}
        facts[name] = again == undisturbed and counted and set(told) == {(i, g.response_ids) for i, g in enumerate(again)}
        facts["resources"].append(resources())
    engine.load_weights(iter(tensors[1].items()), 1)
    updated = engine.generate(REQUESTS, FIXED)
    facts["the update changed something"] = updated != undisturbed
    fail_in_step(engine, 5, die, rank=1)
    facts["present weights"] = engine.generate(REQUESTS, FIXED) == updated and engine.policy_version == 1
    if dist.get_rank() == 1:
        engine._engine._replica._llm.reset_prefix_cache = die
    engine.load_weights(iter(tensors[0].items()), 0)
    same = engine.generate(REQUESTS, FIXED) == undisturbed and engine.policy_version == 0
    facts["failed update"] = same and engine.take_figures() == {"engine_restarts": 2}
    return facts


def refusals_of(engine: RestartingEngine, tensors: list[dict[str, Any]]) -> dict[str, str]:
    """What no restart can cure is raised at once, and so is a failure too many."""
    facts = {"too long": error_of(lambda: engine.generate([Request(prompt_ids=(5,) * CONTEXT, seed=0)], FIXED)),
             "disagreement": error_of(lambda: engine.generate(REQUESTS[dist.get_rank():], FIXED))}
    assert engine.take_figures() == {"engine_restarts": 0}
    engine._max_restarts, engine._restarts = 2, 1
    build = engine._build

    def build_to_fail() -> Engine:
        new = build()
        new._replica._llm.llm_engine.step = die
        return new

    engine._build = build_to_fail
    fail_in_step(engine, 2, die)
    facts["always"] = error_of(lambda: engine.generate(REQUESTS, FIXED))
    return facts


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except EngineError as error:
        return str(error)
    return ""


def main() -> None:
    folder, tensor_parallel = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    models = [make_model("moe", seed) for seed in (0, 1)]
    if dist.get_rank() == 0:
        for seed, model in enumerate(models):
            save(model, folder / f"moe{seed}")
    dist.barrier()
    tensors = [load_file(folder / f"moe{seed}" / "model.safetensors") for seed in (0, 1)]
    engine = make(folder, tensor_parallel, tensors)
    megatron_cpu.install()  # the first engine before it, all others after
    facts = facts_of(engine, tensors)
    facts |= refusals_of(engine, tensors)
    engine.close()
    (folder / f"facts_{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
