"""Simulated ranks of a large world: what each would hold of a full-size model, and what export would make of it. No weights, no communication.

Usage: full_size_ranks.py PLAN OUTPUT. The plan is JSON: `models` (name -> directory with a config.json) and `layouts` (name, world size, fields of
`ParallelConfig`, names of models). OUTPUT gets a JSON file for each layout and model; its keys are those of `Rebuilt`.

One process plays one rank after the other, with torch's fake process groups and modules on the meta device. Real are: Megatron's groups of the whole
world, as Megatron itself creates them; the model chunks that `build_model` makes; `local_weights`, which names their parameters; and the merging of
`WeightStream`, fed by every rank's place in its groups.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import ParallelConfig, RunConfig, build_config
from megatron_antisd.config.rules import check_layout
from megatron_antisd.models.build import ModelDescription, build_model, describe
from megatron_antisd.models.weight_map import Geometry, Layout, merge
from megatron_antisd.parallel import reshard
from megatron_antisd.parallel.layout import ProcessLayout, build_layout
from megatron_antisd.parallel.reshard import ShardedWeight, WeightStream, local_weights, tied_copy

TENSOR, PIPELINE = "TENSOR_MODEL_PARALLEL_GROUP", "PIPELINE_MODEL_PARALLEL_GROUP"
EXPERT, EXPERT_TENSOR = "EXPERT_MODEL_PARALLEL_GROUP", "EXPERT_TENSOR_PARALLEL_GROUP"
EXPERT_SHARDS, REPLICAS = "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP"
Held = list[tuple[ShardedWeight, torch.nn.Parameter]]


@dataclass(kw_only=True)
class Rebuilt:
    """One model in one layout."""

    tensors: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    """Name and shape of every merged tensor, over all pipeline stages and one set of replicas."""
    held: list[int] = field(default_factory=list)
    """Parameters of each rank."""
    merged: list[int] = field(default_factory=list)
    """Parameters of each rank that some group of ranks merges, counted over all groups."""
    layers: list[list[list[int]]] = field(default_factory=list)
    """Stage -> chunk -> the global numbers of its layers."""
    replicas: int = 0
    """Ranks that hold the same as rank 0, by Megatron's groups."""
    vocabulary_rows: int = 0
    """Rows of the embedding on all tensor-parallel ranks together."""


class World:
    """Every rank's place in Megatron's groups, recorded while one rank creates them: Megatron has every rank create the groups of all."""

    def __init__(self) -> None:
        self.groups: dict[str, list[list[int]]] = {}

    def record(self, ranks: Sequence[int], name: str) -> None:
        if list(ranks) not in self.groups.setdefault(name, []):
            self.groups[name].append(list(ranks))

    def group(self, name: str, rank: int) -> list[int]:
        (found,) = [ranks for ranks in self.groups[name] if rank in ranks]
        return found

    def place(self, name: str, rank: int) -> int:
        """torch numbers the ranks of a group in ascending order."""
        return sorted(self.group(name, rank)).index(rank)


@contextmanager
def simulated_rank(world_size: int, rank: int, parallel: ParallelConfig, world: World | None = None) -> Iterator[ProcessLayout]:
    """This process as `rank`; with `world`, its groups are written there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    original = parallel_state.create_group

    def create_group(ranks: Sequence[int], *args: Any, group_desc: str, **kwargs: Any) -> dist.ProcessGroup:
        if world is not None:
            world.record(ranks, group_desc)
        return original(ranks, *args, group_desc=group_desc, **kwargs)

    parallel_state.create_group = create_group
    try:
        yield build_layout(parallel, seed=0)
    finally:
        parallel_state.create_group = original
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def hold(description: ModelDescription, config: RunConfig, layout: ProcessLayout) -> tuple[Held, list[list[int]]]:
    """What the simulated rank holds, and the layers of its chunks."""
    with torch.device("meta"):
        chunks = build_model(description, config.model, config.parallel)
    held = local_weights(chunks, description, layout)
    copy = tied_copy(chunks, description, layout)
    distinct = {id(parameter) for _, parameter in held} | ({id(copy)} if copy is not None else set())
    assert distinct == {id(parameter) for chunk in chunks for parameter in chunk.parameters()}, "a parameter that no row names"
    assert len(held) + (copy is not None) == len(distinct), "a parameter that two rows name"
    assert all(parameter.is_meta for _, parameter in held), "weights at full size would not fit into memory"
    if copy is not None:
        assert copy.shape == (description.geometry.padded_vocab_size // layout.tensor_size, description.sizes.hidden)
    return held, [[layer.layer_number - 1 for layer in chunk.decoder.layers] for chunk in chunks]


def check_places(world: World, layout: ProcessLayout) -> None:
    """The recorded groups are the groups that this rank works with."""
    rank = layout.rank
    groups = {TENSOR: layout.tensor, PIPELINE: layout.pipeline, EXPERT_SHARDS: layout.expert_shards, REPLICAS: layout.replicas}
    for name, group in groups.items():
        assert dist.get_process_group_ranks(group) == sorted(world.group(name, rank)), name
    places = {TENSOR: layout.tensor_rank, PIPELINE: layout.pipeline_rank, EXPERT: layout.expert_rank, EXPERT_TENSOR: layout.expert_tensor_rank,
              REPLICAS: layout.replica_rank}
    assert {name: world.place(name, rank) for name in places} == places


class Stage:
    """One pipeline stage: what its ranks hold, merged by every group of ranks that export would gather over."""

    def __init__(self, world: World, ranks: list[int], held: Held, description: ModelDescription, layout: ProcessLayout) -> None:
        self.world, self.ranks, self.held = world, ranks, held
        self.merged: Counter[int] = Counter()
        self._stream = WeightStream.__new__(WeightStream)  # its __init__ communicates
        self._stream.description, self._stream.layout = description, layout

    def rebuild(self) -> list[tuple[str, tuple[int, ...]]]:
        """Merge over the groups of the stage's first rank; all other groups have the same places in the same order, so they make the same."""
        dense = [(entry, parameter) for entry, parameter in self.held if not entry.weight.expert]
        experts = [(entry, parameter) for entry, parameter in self.held if entry.weight.expert]
        return [*self._merge(dense, TENSOR, (TENSOR,)), *(self._merge(experts, EXPERT_SHARDS, (EXPERT, EXPERT_TENSOR)) if experts else [])]

    def _merge(self, held: Held, group: str, places: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
        expected: list[tuple[int, ...]] | None = None
        for members in self.world.groups[group]:
            if not set(members) & set(self.ranks):
                continue
            assert set(members) <= set(self.ranks), f"{group} {members} spans pipeline stages"
            found = [tuple(self.world.place(name, rank) for name in places) for rank in sorted(members)]
            expected = expected or found
            assert found == expected, f"{group} {members}: replicas in another order"
            self.merged.update({rank: len(held) for rank in members})
        assert expected is not None and len(set(expected)) == len(expected)
        self._stream._expert_places = expected
        for entry, parameter in held:
            for name, tensor in self._stream._merge(entry, [parameter.detach()] * len(expected)):
                yield name, tuple(tensor.shape)


def simulate(world_size: int, configs: dict[str, RunConfig], descriptions: dict[str, ModelDescription]) -> dict[str, Rebuilt]:
    """Every pipeline stage of one layout, for each model. The models may differ in the layers of their chunks only."""
    rebuilt = {name: Rebuilt(held=[0] * world_size, merged=[0] * world_size) for name in configs}
    parallel = next(iter(configs.values())).parallel
    world = World()
    with simulated_rank(world_size, 0, parallel, world) as layout:
        replicas = layout.replica_size
    for stage in range(parallel.pipeline_parallel_size):
        ranks = [rank for rank in range(world_size) if world.place(PIPELINE, rank) == stage]
        first = play(world, world_size, ranks[0], parallel, configs, descriptions)
        # Shapes depend on the stage alone, not on the other places: the last rank differs from the first in every one of them.
        last = play(world, world_size, ranks[-1], parallel, configs, descriptions)
        for name, (held, layers, layout) in first.items():
            other, other_layers, _ = last[name]
            assert [entry for entry, _ in held] == [entry for entry, _ in other] and layers == other_layers, f"{name}: ranks of stage {stage} differ"
            work, result = Stage(world, ranks, held, descriptions[name], layout), rebuilt[name]
            result.tensors += work.rebuild()
            result.layers.append(layers)
            result.replicas = replicas
            if stage == 0:
                result.vocabulary_rows = held[0][0].shape[0] * layout.tensor_size
            for rank in ranks:
                result.held[rank], result.merged[rank] = len(held), work.merged[rank]
    return rebuilt


def play(world: World, world_size: int, rank: int, parallel: ParallelConfig, configs: dict[str, RunConfig],
         descriptions: dict[str, ModelDescription]) -> dict[str, tuple[Held, list[list[int]], ProcessLayout]]:
    """Be `rank` and build its part of each model."""
    with simulated_rank(world_size, rank, parallel) as layout:
        check_places(world, layout)
        return {name: (*hold(descriptions[name], config, layout), layout) for name, config in configs.items()}


def prepare() -> None:
    """Megatron without a GPU, and two shortcuts for tensors without values, without which this takes three times as long."""
    with torch.device("meta"):
        torch.empty(0)  # torch notes its factories at first use; it must see its own, before Megatron's CPU support wraps them
    megatron_cpu.install()
    torch.nn.init.normal_ = lambda tensor, *args, **kwargs: tensor

    @functools.cache
    def merged(layout: Layout, shapes: tuple[torch.Size, ...], dtype: torch.dtype, geometry: Geometry) -> tuple[torch.Tensor, ...]:
        return merge(layout, [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes], geometry)

    def remembered(layout: Layout, shards: Sequence[torch.Tensor], geometry: Geometry) -> tuple[torch.Tensor, ...]:
        """What `merge` makes of tensors without values depends on their shapes alone."""
        assert all(shard.is_meta for shard in shards)
        return merged(layout, tuple(shard.shape for shard in shards), shards[0].dtype, geometry)

    reshard.merge = remembered


def main() -> None:
    plan, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    prepare()
    for layout in plan["layouts"]:
        configs, descriptions = {}, {}
        for name, parallel in layout["models"].items():
            path = plan["models"][name]
            configs[name] = build_config({"model": {"path": path}, "data": {"train": ["none"]}, "parallel": parallel})
            descriptions[name] = describe(path, configs[name].parallel.tensor_parallel_size)
            check_layout(configs[name], descriptions[name].hf, layout["world_size"])  # a layout that the project refuses proves nothing
        for name, rebuilt in simulate(layout["world_size"], configs, descriptions).items():
            (output / f"{name}--{layout['name']}.json").write_text(json.dumps(asdict(rebuilt)))


if __name__ == "__main__":
    main()
