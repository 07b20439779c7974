"""Weights in and out of the shards: Hugging Face safetensors -> this rank's parameters, and shards -> a stream of
(Hugging Face name, full tensor), bucketed. Pure merging and splitting live in `models.weight_map`; here is the communication."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_antisd.durable import sync
from megatron_antisd.models import transformer_engine
from megatron_antisd.models.build import ModelDescription, PolicyModel
from megatron_antisd.models.huggingface import HuggingfaceCheckpoint, copy_model_files, shard_name, write_index
from megatron_antisd.models.weight_map import Entry, Layout, Weight, merge, split
from megatron_antisd.parallel.layout import ProcessLayout


@dataclass(frozen=True, kw_only=True)
class ShardedWeight:
    """One parameter somewhere in the world: a table row with its layer (and local expert) filled in."""

    weight: Weight
    layer: int | None
    local_expert: int | None
    stage: int
    """Pipeline rank that holds it."""
    shape: tuple[int, ...]
    """Of one shard."""
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def entry(self, expert: int | None) -> Entry:
        """In the whole model, where its expert is number `expert`."""
        return Entry(weight=self.weight, layer=self.layer, expert=expert)


def local_weights(chunks: Sequence[PolicyModel], description: ModelDescription,
                  layout: ProcessLayout) -> list[tuple[ShardedWeight, torch.nn.Parameter]]:
    """This rank's parameters, each with its row, chunk by chunk in table order. Raises RuntimeError for a parameter no row names."""
    experts = description.experts // layout.expert_size if description.experts else 0
    found: list[tuple[ShardedWeight, torch.nn.Parameter]] = []
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}
        for weight in description.weights:
            name = weight.megatron if chunk.layer_spec == "local" else transformer_engine.parameter_name(weight.megatron, moe=bool(experts))
            for local_layer, layer in numbers.items() if "{layer}" in weight.megatron else [(None, None)]:
                for expert in range(experts) if weight.expert else [None]:
                    parameter = parameters.pop(name.format(layer=local_layer, expert=expert), None)
                    if parameter is not None:
                        found.append((ShardedWeight(
                            weight=weight, layer=layer, local_expert=expert, stage=layout.pipeline_rank,
                            shape=tuple(parameter.shape), dtype=parameter.dtype), parameter))
        # A tied output layer on the last of several stages is a copy of the embedding and has no name of its own.
        leftover = [name for name in parameters if not (description.tied and name == "output_layer.weight")]
        if leftover:
            raise RuntimeError(f"parameters without a row in the weight table: {leftover}; add them to the family's table")
    return found


def tied_copy(chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> torch.nn.Parameter | None:
    """The second home of a tied embedding, as output layer of the last of several stages; None on other ranks and for other models."""
    return chunks[-1].output_layer.weight if description.tied and layout.pipeline_size > 1 and layout.is_last_stage else None


def global_expert(local: int | None, description: ModelDescription, layout: ProcessLayout) -> int | None:
    """Number in the whole model of this rank's expert `local`."""
    return None if local is None else layout.expert_rank * (description.experts // layout.expert_size) + local


def load_huggingface(chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout, model_dir: str | Path) -> None:
    """Fill this rank's parameters from safetensors. Raises ConfigError, before anything is loaded, where they are not the described model's."""
    reader = HuggingfaceCheckpoint(model_dir)
    reader.check(description)

    def fill(parameter: torch.nn.Parameter, entry: Entry) -> None:
        rank, size = tensor_place(entry.weight, layout)
        full = [reader.read(name) for name in entry.huggingface]
        value = split(entry.weight.layout, full, rank, size, description.geometry)
        if parameter.shape != value.shape:
            raise RuntimeError(f"{entry.name} has the shape {tuple(parameter.shape)}, its row in the weight table gives {tuple(value.shape)}")
        with torch.no_grad():
            parameter.copy_(value)

    for sharded, parameter in local_weights(chunks, description, layout):
        fill(parameter, sharded.entry(global_expert(sharded.local_expert, description, layout)))
    copy = tied_copy(chunks, description, layout)
    if copy is not None:
        fill(copy, description.embedding())


class WeightStream:
    """Streams the policy out of the trainer. Planned once; every rank must drain every stream it starts (collective)."""

    def __init__(self, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout, bucket_bytes: int) -> None:
        self.description, self.layout = description, layout
        held = local_weights(chunks, description, layout)
        self._local = {(e.weight.megatron, e.layer, e.local_expert): p for e, p in held}
        everyone: list[list[ShardedWeight]] = [[] for _ in range(layout.pipeline_size)]
        mine = [entry for entry, _ in held]
        dist.all_gather_object(everyone, mine, group=layout.pipeline)
        entries = [entry for stage in everyone for entry in stage]
        copy = tied_copy(chunks, description, layout)
        if copy is not None:
            self._local[description.embedding().weight.megatron, None, None] = copy
        self.buckets = _plan_buckets(entries, layout, bucket_bytes)
        places: list[tuple[int, int]] = [(0, 0)] * dist.get_world_size(layout.expert_shards)
        dist.all_gather_object(places, (layout.expert_rank, layout.expert_tensor_rank), group=layout.expert_shards)
        self._expert_places = places

    def stream(self, source: Callable[[torch.nn.Parameter], torch.Tensor] = torch.Tensor.detach) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor on this rank's device), the same on every rank. `source` picks what travels: the
        parameter itself, or a tensor of its shape such as its gradient."""
        for bucket in self.buckets:
            shards = self._gather(bucket, source)  # [ranks of the shard group, numel of the bucket]
            offset = 0
            for entry in bucket:
                parts = [row[offset : offset + entry.numel].view(entry.shape) for row in shards]
                offset += entry.numel
                yield from self._merge(entry, parts)

    @torch.no_grad()
    def _gather(self, bucket: Sequence[ShardedWeight], source: Callable[[torch.nn.Parameter], torch.Tensor]) -> torch.Tensor:
        layout, first = self.layout, bucket[0]
        holders = self._holders(first)
        size = _shard_count(first, layout)
        numel = sum(entry.numel for entry in bucket)
        dtype = first.dtype if source is torch.Tensor.detach else torch.float32  # gradients are fp32
        held = layout.pipeline_rank in holders
        flat = torch.cat([source(self._local[(e.weight.megatron, e.layer, e.local_expert)]).flatten() for e in bucket]) if held else None
        if held and size == 1:
            shards = flat[None]  # a collective of one rank would copy it all the same
        else:
            shards = torch.empty(size, numel, dtype=dtype, device=layout.device)
            if held:
                dist.all_gather_into_tensor(shards.view(-1), flat, group=layout.expert_shards if first.weight.expert else layout.tensor)
        self._hand_on(shards, holders)
        return shards

    def _holders(self, entry: ShardedWeight) -> tuple[int, ...]:
        """Pipeline stages that hold it; a tied embedding stands on the first and on the last."""
        twice = self.description.tied and entry.weight.layout is Layout.VOCAB and self.layout.pipeline_size > 1
        return (0, self.layout.pipeline_size - 1) if twice else (entry.stage,)

    def _hand_on(self, tensor: torch.Tensor, holders: tuple[int, ...]) -> None:
        """From the first holder to the stages that do not hold it."""
        layout = self.layout
        if len(holders) == 1:
            if layout.pipeline_size > 1:
                dist.broadcast(tensor, src=dist.get_global_rank(layout.pipeline, holders[0]), group=layout.pipeline)
            return
        others = [stage for stage in range(layout.pipeline_size) if stage not in holders]
        messages = []
        if layout.pipeline_rank == holders[0]:
            messages = [dist.P2POp(dist.isend, tensor, dist.get_global_rank(layout.pipeline, stage), layout.pipeline) for stage in others]
        elif layout.pipeline_rank in others:
            messages = [dist.P2POp(dist.irecv, tensor, dist.get_global_rank(layout.pipeline, holders[0]), layout.pipeline)]
        for request in dist.batch_isend_irecv(messages) if messages else []:
            request.wait()

    def _merge(self, entry: ShardedWeight, parts: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        geometry = self.description.geometry
        if not entry.weight.expert:
            yield from zip(entry.entry(None).huggingface, merge(entry.weight.layout, parts, geometry), strict=True)
            return
        experts = self.description.experts // self.layout.expert_size
        for expert_rank in range(self.layout.expert_size):
            by_tensor_rank = {place[1]: part for place, part in zip(self._expert_places, parts, strict=True) if place[0] == expert_rank}
            mine = [by_tensor_rank[rank] for rank in range(self.layout.expert_tensor_size)]
            names = entry.entry(expert_rank * experts + entry.local_expert).huggingface
            yield from zip(names, merge(entry.weight.layout, mine, geometry), strict=True)


def save_huggingface(stream: Iterable[tuple[str, torch.Tensor]], source: str | Path, directory: Path, *, write: bool,
                     shard_bytes: int = 4 << 30) -> None:
    """Drain a weight stream into `directory`: sharded safetensors with index, and `source`'s config and tokenizer files.
    Written beside the target and renamed at the end, so that `directory` is whole or absent wherever the process dies. Collective through the
    stream; only the rank with `write` touches the disk."""
    if not write:
        for _ in stream:
            pass
        return
    work, old = (directory.with_name(directory.name + ending) for ending in (".incomplete", ".old.incomplete"))
    for path in (work, old):
        shutil.rmtree(path, ignore_errors=True)
    work.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    size = total = 0
    for name, tensor in stream:
        if shard and size + tensor.nbytes > shard_bytes:
            files.append(_write_shard(work, len(files), shard))
            shard, size = {}, 0
        shard[name] = tensor.cpu().contiguous().clone()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    files.append(_write_shard(work, len(files), shard))
    named = {shard_name(number, len(files)): names for number, names in enumerate(files, start=1)}
    for number, name in enumerate(named):
        (work / f"shard-{number}").rename(work / name)
    write_index(work, named, total)
    copy_model_files(Path(source), work)
    for path in (*work.iterdir(), work):
        sync(path)
    if directory.exists():
        directory.rename(old)
    work.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_shard(work: Path, number: int, shard: dict[str, torch.Tensor]) -> list[str]:
    save_file(shard, work / f"shard-{number}", metadata={"format": "pt"})
    return list(shard)


def _plan_buckets(entries: Sequence[ShardedWeight], layout: ProcessLayout, bucket_bytes: int) -> list[list[ShardedWeight]]:
    """Consecutive entries of one stage, one group of ranks and one dtype, up to `bucket_bytes` of gathered tensors. What every rank of a stage
    holds whole is gathered from none; a tied embedding, which two stages hold, goes by itself."""
    buckets: list[list[ShardedWeight]] = []
    size = 0
    last: tuple[Any, ...] | None = None

    def kind(entry: ShardedWeight) -> tuple[Any, ...]:
        return entry.stage, entry.weight.expert, _shard_count(entry, layout), entry.weight.layout is Layout.VOCAB

    for entry in sorted(entries, key=kind):
        cost = entry.numel * _shard_count(entry, layout) * entry.dtype.itemsize
        this = (*kind(entry), entry.dtype)
        if this != last or size + cost > bucket_bytes:
            buckets.append([])
            last, size = this, 0
        buckets[-1].append(entry)
        size += cost
    return buckets


def _shard_count(entry: ShardedWeight, layout: ProcessLayout) -> int:
    """Ranks whose shards together are all of it: all experts of that number within a rank, where it is an expert's."""
    if entry.weight.expert:
        return layout.expert_size * layout.expert_tensor_size
    return 1 if entry.weight.layout is Layout.REPLICATED else layout.tensor_size


def tensor_place(weight: Weight, layout: ProcessLayout) -> tuple[int, int]:
    """(rank, size) among the ranks that a weight is divided over here."""
    return (layout.expert_tensor_rank, layout.expert_tensor_size) if weight.expert else (layout.tensor_rank, layout.tensor_size)
