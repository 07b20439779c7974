"""This rank's parameters under the names of a checkpoint, and their values out of one. `model.path` may be such a checkpoint too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_antisd.config import ConfigError
from megatron_antisd.models.build import ModelDescription, PolicyModel
from megatron_antisd.models.weight_map import Entry, Layout, Weight
from megatron_antisd.parallel.checkpoint_files import CheckpointError, check_model, is_checkpoint, read_manifest
from megatron_antisd.parallel.global_tensors import GlobalTensor, LoadPlanner, place_shard
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.reshard import global_expert, load_huggingface, local_weights, tensor_place, tied_copy


def load_model_weights(chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout, path: str | Path) -> None:
    """Fill a model from `model.path`, be it a checkpoint or a Hugging Face folder. Collective. Raises ConfigError where it cannot be."""
    if not is_checkpoint(path):
        load_huggingface(chunks, description, layout, path)
        return
    try:
        load_weights(Path(path), chunks, description, layout)
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from error


def load_weights(path: Path, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> dict[str, Any]:
    """Fill a model without optimizer; returns the manifest. Collective. Raises CheckpointError, before anything is loaded, for a damaged
    checkpoint or another model's."""
    manifest = on_main(layout, lambda: read_manifest(path))
    check_model(path, manifest, description)
    tensors = {}
    for shard in shards(chunks, description, layout):
        if shard.weight.layout is Layout.VOCAB:
            with torch.no_grad():
                shard.parameter.zero_()  # padding rows are in no checkpoint
        tensors[shard.name] = shard.place(shard.parameter.detach(), 0)
    here = {"tensor_parallel_size": layout.tensor_size, "pipeline_parallel_size": layout.pipeline_size,
            "expert_parallel_size": layout.expert_size, "expert_tensor_parallel_size": layout.expert_tensor_size}
    read_tensors(path, tensors, manifest, here)
    return manifest


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter of this rank under its global name."""

    name: str
    weight: Weight
    parameter: torch.nn.Parameter
    tensor_rank: int
    tensor_size: int
    description: ModelDescription
    copy: bool = False
    """The tied output layer of a last stage: a second home of the embedding, loaded but not saved."""

    def place(self, tensor: torch.Tensor, start: int) -> GlobalTensor:
        """`tensor`: this shard's elements from flat position `start` on."""
        return place_shard(tensor, start, tuple(self.parameter.shape), self.weight.layout, self.tensor_rank, self.tensor_size,
                           self.description.geometry.vocab_size)


def shards(chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> Iterator[Shard]:
    """All parameters of this rank."""

    def shard(entry: Entry, parameter: torch.nn.Parameter, copy: bool = False) -> Shard:
        rank, size = tensor_place(entry.weight, layout)
        return Shard(name=entry.name, weight=entry.weight, parameter=parameter, tensor_rank=rank, tensor_size=size, description=description,
                     copy=copy)

    for sharded, parameter in local_weights(chunks, description, layout):
        yield shard(sharded.entry(global_expert(sharded.local_expert, description, layout)), parameter)
    copy = tied_copy(chunks, description, layout)
    if copy is not None:
        yield shard(description.embedding(), copy, copy=True)


def read_tensors(path: Path, tensors: dict[str, GlobalTensor], manifest: dict[str, Any], here: dict[str, Any]) -> None:
    """Fill `tensors` from a checkpoint; `here` is the layout, for the message of CheckpointError. Collective."""
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / "tensors"), planner=LoadPlanner())
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be loaded: {failures(error)}\nwritten on layout {manifest['layout']}, loaded on {here}") from error


def failures(error: CheckpointException) -> str:
    """What went wrong on which rank, without the tracebacks, which the cause keeps."""
    return "; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items())


def on_main(layout: ProcessLayout, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; its result, or its failure as CheckpointError of whichever kind, on every rank."""
    answer: list[Any] = [None, None]
    cause: Exception | None = None
    if layout.is_main:
        try:
            answer[0] = action()
        except (CheckpointError, OSError, TypeError, ValueError) as error:
            cause, answer[1] = error, error if isinstance(error, CheckpointError) else CheckpointError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1] from cause
    return answer[0]
