"""How long would a weight sync of Qwen3-30B-A3B take on GPUs? `python -m benchmarks.sync_time_model`. A model, not a measurement: no GPU ran it.

The bytes are those of the plan that a run would follow, between every two ranks. A rank's links take them one after another: NVLink to ranks of its
node, its network card to others, both at once. The sync takes as long as the busiest link of all, part by part (all ranks start a part
together, the next one flies while this one is loaded), or as long as loading, whichever is longer.

Peers, same model, as they published them: NeMo-RL 0.74-1.00 s (shard to shard, EP8 x PP2 -> TP8 x DP2), miles 2.16 s by RDMA and 2.67 s by NCCL on
4 nodes. Goal: at most 1 s where trainer and engines share 1, 4 and 16 nodes of 8 and engines are TP8, as NeMo-RL's were.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GOAL_SECONDS = 1.0
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
PART_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes a second, one direction, of one GPU; and what each part costs besides."""

    name: str
    inside: float
    """To GPUs of its node."""
    outside: float
    """Its share of the node's network cards."""
    memory: float
    """A byte is read and written about four times on its way into the engine's kernels: packed, taken apart, loaded, packed anew."""
    part_seconds: float = 0.003
    """Start of a batch of messages and the wait for it: assumed."""
    piece_seconds: float = 10e-6
    """Launch of the copy that puts a piece into its message: assumed."""


MACHINES = (
    Machine(name="H100, NVLink 450 GB/s, one 400 Gb/s card a GPU; 70 % of either", inside=0.7 * 450e9, outside=0.7 * 50e9, memory=3.35e12 * 0.6),
    Machine(name="PCIe 4 (32 GB/s), one 100 Gb/s card for 4 GPUs; 70 % of either", inside=0.7 * 32e9, outside=0.7 * 12.5e9 / 4,
            memory=1.5e12 * 0.6, part_seconds=0.01),
)
TENSOR_SECONDS = 25e-6
"""A tensor through vLLM's Python loaders, twice (it counts first, then loads): assumed."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Trainer and engine layout; `servers`: on nodes of their own, as many as the trainer's."""

    nodes: int
    trainer: dict[str, int]
    engine: int
    servers: bool = False

    def __str__(self) -> str:
        sizes = " ".join(f"{key}{value}" for key, value in (
            ("TP", self.trainer["tensor"]), ("PP", self.trainer["pipeline"]), ("EP", self.trainer["expert"])))
        return f"{self.nodes} x 8, {sizes} -> TP{self.engine}" + (" on other nodes" if self.servers else "")


def cases() -> list[Case]:
    found = []
    for nodes in (1, 4, 16):
        # tensor x data = ranks of a stage; expert-parallel ranks are whole (expert-tensor 1)
        stages = 1 if nodes == 1 else 2
        trainer = {"tensor": 2, "pipeline": stages, "expert": 8, "expert_tensor": 1, "data": nodes * 8 // (2 * stages)}
        found += [Case(nodes=nodes, trainer=trainer, engine=engine, servers=servers) for servers in (False, True) for engine in (1, 8)]
    return found


def traffic(case: Case) -> tuple[list[dict[str, dict[tuple[int, str], int]]], int, int]:
    """(for each part: link -> (rank, direction) -> bytes, tensors of an engine rank, bytes of an engine rank)."""
    from megatron_antisd.models.description import ModelDescription
    from megatron_antisd.models.qwen3 import weights
    from megatron_antisd.models.sizes import Sizes
    from megatron_antisd.models.weight_map import Geometry
    from megatron_antisd.parallel.placement import EngineLayout, planned_places
    from megatron_antisd.parallel.sync_plan import SyncPlan
    from megatron_antisd.wire.instructions import LOCAL

    sizes = Sizes.of(QWEN3_30B_A3B)
    description = ModelDescription(
        hf=QWEN3_30B_A3B, sizes=sizes, weights=weights(QWEN3_30B_A3B), tied=False,
        geometry=Geometry(groups=sizes.groups, head_dim=sizes.head_dim, vocab_size=sizes.vocab, padded_vocab_size=sizes.vocab))
    places = planned_places(description, **case.trainer)
    ranks = len(places)
    nodes = [case.nodes + rank // 8 for rank in range(ranks)] if case.servers else []
    plan = SyncPlan(description, places, EngineLayout(tensor_size=case.engine), part_bytes=PART_BYTES, engine_ranks=ranks, inside=not case.servers,
                    dtypes={weight.megatron: ("bfloat16", 2) for weight in description.weights}, nodes=nodes)
    parts = []
    for part in range(len(plan.parts)):
        links: dict[str, dict[tuple[int, str], int]] = {"inside": defaultdict(int), "outside": defaultdict(int), "pieces": defaultdict(int)}
        for engine_rank in range(ranks):
            node = plan._nodes[engine_rank]
            for move in plan.moves(part, engine_rank):
                if move.sender != LOCAL:
                    size, link = move.box.numel * 2, links["inside" if places[move.sender].node == node else "outside"]
                    links["pieces"][move.sender, "out"] += 1
                    link[move.sender, "out"] += size
                    link[engine_rank + (ranks if case.servers else 0), "in"] += size
        parts.append(links)
    needs = [need.numel * 2 for tensor in plan.tensors.values() if (need := tensor.needs[0]) is not None]
    return parts, len(needs), sum(needs)


def seconds(parts: Sequence[dict[str, dict[tuple[int, str], int]]], tensors: int, size: int, machine: Machine) -> tuple[float, float]:
    """(on the links, loading)."""
    speeds = {"inside": machine.inside, "outside": machine.outside, "pieces": 1 / machine.piece_seconds}
    flying = sum(machine.part_seconds + max((max(link.values(), default=0) / speeds[name] for name, link in links.items())) for links in parts)
    return flying, 4 * size / machine.memory + tensors * TENSOR_SECONDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print; 1 where the goal is missed on the first machine by TP8 engines in the trainer's processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16, help="leave out cases of more nodes")
    given = parser.parse_args(arguments)
    print("| nodes and layout | plan, s | received by a rank, GB: mean, worst; of it from other nodes | most sent by a rank, GB | "
          + " | ".join(f"{machine.name}: links, loading, sync, s" for machine in MACHINES) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(MACHINES), flush=True)
    worst = 0.0
    for case in cases():
        if case.nodes > given.nodes:
            continue
        begin = time.perf_counter()
        parts, tensors, size = traffic(case)
        planning = time.perf_counter() - begin
        totals: dict[str, dict[tuple[int, str], int]] = {"all": defaultdict(int), "outside": defaultdict(int)}
        for links in parts:
            for name, link in ((name, link) for name, link in links.items() if name != "pieces"):
                for key, value in link.items():
                    totals["all"][key] += value
                    if name == "outside":
                        totals["outside"][key] += value
        received = [value for (_, way), value in totals["all"].items() if way == "in"] or [0]
        sent = max((value for (_, way), value in totals["all"].items() if way == "out"), default=0)
        far = max((value for (_, way), value in totals["outside"].items() if way == "in"), default=0)
        cells = []
        for machine in MACHINES:
            flying, loading = seconds(parts, tensors, size, machine)
            cells.append(f"{flying:.2f}, {loading:.2f}, **{max(flying, loading):.2f}**")
            if machine is MACHINES[0] and not case.servers and case.engine == 8:
                worst = max(worst, flying, loading)
        figures = [f"{planning:.1f}", f"{sum(received) / len(received) / 1e9:.1f}, {max(received) / 1e9:.1f}; {far / 1e9:.1f}", f"{sent / 1e9:.1f}"]
        print(f"| {case} | {' | '.join([*figures, *cells])} |", flush=True)
    print(f"\nLongest into TP8 engines in the trainer's processes, first machine: {worst:.2f} s. "
          "NeMo-RL 0.74-1.00 s, miles 2.16-2.67 s (measured by them).")
    return int(worst > GOAL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
