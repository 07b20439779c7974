"""One vLLM and weights that go wrong on the way, each in another way: which of them do the checksums show? `proof_faults.py FOLDER FAMILY`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_models import CONTEXT, make_model, save

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.vllm_replica import VllmReplica, engine_arguments
from megatron_antisd.wire.boxes import Box
from megatron_antisd.wire.checksums import box_checksum

Tensors = Mapping[str, torch.Tensor]
EXPERTS = [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5)]
Q, GATE, NORM = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"


def expected(tensors: Tensors) -> dict[str, int]:
    return {name: box_checksum(tensor, Box.whole(tensor.shape), tensor.shape[1] if tensor.dim() == 2 else 1) for name, tensor in tensors.items()}


def one_bit(tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    changed = tensors[name].clone()
    changed.view(torch.int32).view(-1)[7] ^= 1
    return {**tensors, name: changed}


def swapped(tensors: Tensors, first: str, second: str) -> dict[str, torch.Tensor]:
    return {**tensors, first: tensors[second], second: tensors[first]}


def without(tensors: Tensors, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def differing(replica: VllmReplica, sent: Tensors, wanted: dict[str, int]) -> list[str]:
    """Tensors whose checksums are not those wanted, after `sent` was loaded."""
    replica._expected = None  # a missing name is to be found by its checksum here, not by the list of names
    got = replica.load_weights(iter(sent.items()), list(wanted))
    return sorted(name for name in wanted if got.get(name) != wanted[name])


def torn_reload(replica: VllmReplica, old: Tensors, new: Tensors) -> Iterator[list[str]]:
    """A stream that breaks off in the middle of a module, and the whole one after it."""

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in old.items():
            yield name, tensor
            if name == Q:
                raise RuntimeError("broken off")

    try:
        replica.load_weights(breaking())
    except RuntimeError as error:
        assert str(error).endswith("RuntimeError: broken off")
    yield differing(replica, new, expected(new))


def main(folder: Path, family: str) -> None:
    tensors = [save(make_model(family, seed), folder / str(seed)) for seed in (0, 1)]
    old, new = tensors
    arguments = engine_arguments(
        RolloutConfig(max_context=CONTEXT, max_sequences=4, kv_cache_bytes=16 << 20), dtype="float32", seed=0, max_context=CONTEXT,
        load_format="auto", hf_overrides=None, executor="uni")
    replica = VllmReplica(folder / "0", arguments, stall_seconds=60)
    replica.start()
    wanted = expected(new)
    facts: dict[str, Any] = {"all": len(wanted), "whole": differing(replica, new, wanted)}
    faults: dict[str, Callable[[], Tensors]] = {
        "one_bit": lambda: one_bit(new, Q), "one_bit_of_a_norm": lambda: one_bit(new, NORM), "dropped": lambda: without(new, NORM),
        "dropped_of_a_stack": lambda: without(new, Q), "old_value": lambda: {**new, Q: old[Q]},
        "swapped": lambda: swapped(new, *(EXPERTS if family == "moe" else ("model.layers.0.mlp.up_proj.weight", GATE)))}
    for name, make in faults.items():
        facts[name] = differing(replica, make(), wanted)
    (facts["after_a_broken_reload"],) = torn_reload(replica, old, new)
    worker = replica._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    worker.reload_weights = lambda weights_iterator: [None for _ in weights_iterator]  # takes the weights and loads none
    facts["stale"] = differing(replica, old, expected(old))
    replica.close()
    print("FACTS " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
