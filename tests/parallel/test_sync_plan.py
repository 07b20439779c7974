"""The plan of a weight sync, carried out between threads: what every engine rank gets is the slice of the Hugging Face tensor that vLLM takes."""

from __future__ import annotations

import json
import queue
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_antisd.models.description import ModelDescription, describe
from megatron_antisd.models.weight_map import split
from megatron_antisd.parallel.placement import EngineLayout, TrainerPlace, planned_places
from megatron_antisd.parallel.sync_plan import SyncPlan
from megatron_antisd.parallel.weight_sender import WeightSender, compare
from megatron_antisd.wire.boxes import HeldPart
from megatron_antisd.wire.exchange import Script, run
from megatron_antisd.wire.instructions import LOCAL, incoming_from_json, incoming_to_json
from megatron_antisd.wire.transports import Pending, Transport

CONFIG = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24,
          "vocab_size": 131, "tie_word_embeddings": False}
MODELS = {"dense": {"model_type": "qwen3"}, "tied": {"model_type": "qwen3", "tie_word_embeddings": True},
          "moe": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
          "olmo3": {"model_type": "olmo3"}}
LAYOUTS: dict[str, dict[str, int]] = {
    "one": {}, "TP2": {"tensor": 2}, "TP2 PP2 DP2": {"tensor": 2, "pipeline": 2, "data": 2}, "PP4": {"pipeline": 4},
    "TP2 PP2 EP2 ETP1": {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1},
    "TP2 PP2 EP2 ETP2": {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 2, "data": 2}, "EP4": {"expert": 4, "data": 4}}
CASES = [("dense", "one"), ("dense", "TP2 PP2 DP2"), ("tied", "TP2 PP2 DP2"), ("tied", "PP4"), ("moe", "TP2 PP2 EP2 ETP1"),
         ("moe", "TP2 PP2 EP2 ETP2"),
         ("moe", "EP4"), ("moe", "TP2 PP2 DP2"), ("olmo3", "TP2")]


def description_of(model: str, folder: Path, tensor: int) -> ModelDescription:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **MODELS[model]}))
    return describe(folder, tensor)


def full_tensors(description: ModelDescription) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in description.huggingface_shapes().items()}


def shards(description: ModelDescription, place: TrainerPlace, full: Mapping[str, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """This rank's Megatron parameters, by the function that loads checkpoints."""
    return {(e.weight.megatron, e.layer, e.expert): split(
                e.weight.layout, [full[n] for n in e.huggingface], *place.divided(e.weight), description.geometry)
            for e in description.entries() if place.holds(e, description.experts)}


class Queues(Transport):
    """Messages between threads."""

    def __init__(self, queues: dict[tuple[int, int], queue.Queue[torch.Tensor]], me: int) -> None:
        self._queues, self._me = queues, me

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Pending:
        for peer, tensor in sends.items():
            self._queues[self._me, peer].put(tensor)
        queues, me = self._queues, self._me

        class Arrival(Pending):
            def wait(self, timeout: float) -> None:
                for peer, tensor in receives.items():
                    tensor.copy_(queues[peer, me].get(timeout=timeout))

        return Arrival()


def carry_out(plan: SyncPlan, parameters: list[dict[Any, torch.Tensor]], *, through_json: bool) -> list[dict[str, torch.Tensor]]:
    """What each engine rank gets."""
    world, inside = len(parameters), plan.inside
    queues: dict[tuple[int, int], queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)
    for sender in range(world):
        for receiver in range(world + plan.engine_ranks):
            queues[sender, receiver] = queue.Queue()
    got: list[dict[str, torch.Tensor]] = [{} for _ in range(plan.engine_ranks)]
    first = 0 if inside else world

    def act(number: int) -> None:
        engine = number - first if number >= first and number - first < plan.engine_ranks else None
        incoming = [] if engine is None else plan.incoming(engine)
        if incoming and through_json:
            incoming = incoming_from_json(incoming_to_json(incoming))
        script = Script(
            parts=len(plan.parts), outgoing=plan.outgoing(number) if number < world else (), incoming=incoming, number_of_trainer=lambda rank: rank,
            number_of_engine=lambda rank: first + rank, parameter=parameters[number].__getitem__ if number < world else None,
            device=torch.device("cpu"), timeout=20)
        for name, tensor in run(script, Queues(queues, number)):
            if engine is not None:
                got[engine][name] = tensor

    threads = [threading.Thread(target=act, args=(number,)) for number in range(world if inside else world + plan.engine_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def taken(name: str, full: torch.Tensor, place: int, engine: EngineLayout, model: str) -> tuple[int, int, int] | None:
    """(dimension, first, count) that vLLM takes of a tensor, written down from its layers; None: not this rank's expert."""
    size = engine.tensor_size
    if "experts" in name and engine.expert_parallel:
        share = MODELS["moe"]["num_experts"] // size
        return (0, 0, full.shape[0]) if int(name.split("experts.")[1].split(".")[0]) // share == place else None
    if any(part in name for part in ("q_proj", "gate_proj", "up_proj")):
        return 0, place * full.shape[0] // size, full.shape[0] // size
    if any(part in name for part in ("k_proj", "v_proj")):
        heads = max(1, CONFIG["num_key_value_heads"] // size)
        return 0, place * CONFIG["num_key_value_heads"] // size * CONFIG["head_dim"], heads * CONFIG["head_dim"]
    if any(part in name for part in ("o_proj", "down_proj")):
        return 1, place * full.shape[1] // size, full.shape[1] // size
    if "embed_tokens" in name or "lm_head" in name:
        height = 192 // size  # 131 rows, filled up to a multiple of 64
        return 0, min(131, place * height), max(0, min(height, 131 - place * height))
    return 0, 0, full.shape[0]


@pytest.mark.parametrize("engine", [EngineLayout(tensor_size=1), EngineLayout(tensor_size=2), EngineLayout(tensor_size=4),
                                    EngineLayout(tensor_size=2, expert_parallel=True)], ids=["TP1", "TP2", "TP4", "EP2"])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "server"])
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_engine_ranks_get_their_slices(tmp_path: Path, model: str, layout: str, inside: bool, engine: EngineLayout) -> None:
    sizes = LAYOUTS[layout]
    description = description_of(model, tmp_path, sizes.get("tensor", 1))
    places = planned_places(description, **sizes)
    if (engine.expert_parallel and model != "moe") or (inside and len(places) % engine.tensor_size):
        pytest.skip("no such engine")
    full = full_tensors(description)
    plan = SyncPlan(description, places, engine, dtypes={w.megatron: ("float32", 4) for w in description.weights}, part_bytes=2048,
                    engine_ranks=len(places) if inside else engine.tensor_size, inside=inside)
    got = carry_out(plan, [shards(description, place, full) for place in places], through_json=not inside)
    for rank, tensors in enumerate(got):
        place = rank % engine.tensor_size
        wanted = {name: slice_ for name in full if (slice_ := taken(name, full[name], place, engine, model)) is not None}
        assert tensors.keys() == wanted.keys()
        for name, (dim, begin, count) in wanted.items():
            tensor, expected = tensors[name], full[name].narrow(dim, begin, count)
            assert tensor.shape == full[name].shape and torch.equal(tensor.narrow(dim, begin, count), expected), (rank, name)
            assert not isinstance(tensor, HeldPart) or tensor.held()[0].numel() == expected.numel(), f"{name}: more than is needed"


def test_what_a_process_holds_is_not_sent_and_copies_share_the_sending(tmp_path: Path) -> None:
    description = description_of("moe", tmp_path, 2)
    places = planned_places(description, tensor=2, expert=2, expert_tensor=1, data=4)  # 8 ranks, four copies of all
    plan = SyncPlan(description, places, EngineLayout(tensor_size=1), dtypes={w.megatron: ("float32", 4) for w in description.weights},
                    part_bytes=1 << 12, engine_ranks=8, inside=True)
    sent = [sum(message.size for part in plan.outgoing(rank) for message in part) for rank in range(8)]
    assert max(sent) < 1.25 * sum(sent) / 8
    for rank in range(8):
        for part in range(len(plan.parts)):
            for move in plan.moves(part, rank):
                assert (move.sender == LOCAL) == (rank in move.holding.ranks)


def test_a_rank_of_the_same_node_sends(tmp_path: Path) -> None:
    description = description_of("dense", tmp_path, 2)
    places = planned_places(description, tensor=2, data=4, ranks_a_node=4)
    plan = SyncPlan(description, places, EngineLayout(tensor_size=2), dtypes={w.megatron: ("float32", 4) for w in description.weights},
                    part_bytes=1 << 12, engine_ranks=4, inside=False, nodes=[1, 1, 0, 0])
    for rank, node in enumerate((1, 1, 0, 0)):
        assert {places[move.sender].node for part in range(len(plan.parts)) for move in plan.moves(part, rank)} == {node}


def test_parts_end_where_modules_do_and_stages_take_turns(tmp_path: Path) -> None:
    description = description_of("moe", tmp_path, 1)
    plan = SyncPlan(description, planned_places(description, pipeline=2), EngineLayout(tensor_size=1), engine_ranks=1, inside=False,
                    dtypes={w.megatron: ("float32", 4) for w in description.weights}, part_bytes=8192)
    for part in plan.parts:
        assert sum(t.needs[0].numel * 4 for t in part) <= 8192
    qkv = [{t.name.split(".")[4] for t in part if ".layers.1.self_attn." in t.name} & {"q_proj", "k_proj", "v_proj"} for part in plan.parts]
    assert {"q_proj", "k_proj", "v_proj"} in qkv, "what vLLM loads as one module comes in one part"


@pytest.mark.parametrize("pipeline", [4, 8])
@pytest.mark.parametrize("part_bytes", [2048, 1 << 14])
def test_a_part_bounds_what_a_rank_sends_and_stages_send_together(tmp_path: Path, pipeline: int, part_bytes: int) -> None:
    """Each stage on one rank, which feeds an engine of one rank in every other process; with the smaller part modules and tensors exceed it."""
    config = {**CONFIG, **MODELS["moe"], "num_hidden_layers": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    description = describe(tmp_path, 1)
    plan = SyncPlan(description, planned_places(description, pipeline=pipeline), EngineLayout(tensor_size=1), engine_ranks=pipeline, inside=True,
                    dtypes={w.megatron: ("float32", 4) for w in description.weights}, part_bytes=part_bytes)
    sent = [[sum(message.size for message in part) for part in plan.outgoing(rank)] for rank in range(pipeline)]
    assert max(map(max, sent)) <= part_bytes
    assert all(sum(part.sizes.values()) <= part_bytes for rank in range(pipeline) for part in plan.incoming(rank))
    if part_bytes == 1 << 14:
        together = [sum(rank[part] > 0 for rank in sent) for part in range(len(plan.parts))]
        assert sum(together) / len(together) > pipeline / 2


def test_samples_of_any_stride_reach_every_kind_of_every_layer(tmp_path: Path) -> None:
    sender = WeightSender.__new__(WeightSender)
    sender._description = description_of("moe", tmp_path, 1)
    every = set(sender._description.huggingface_shapes())
    for stride in range(1, 9):
        assert {name for sync in range(200) for name in sender.sample(sync * stride, 8)} == every, stride


def test_a_report_that_is_missing_is_a_problem_and_padding_alone_is_none() -> None:
    report = {"version": 1, "checksums": {"a": 0}, "error": None}
    assert compare({"a": {0: 0, 1: 0}}, [report, report], 1, ranks=2) == []
    for reports in ([], [report]):
        assert compare({"a": {0: 0, 1: 0}}, reports, 1, ranks=2) == [f"{len(reports)} reports of the engine ranks from 0 on, expected 2, one of each"]
