"""What a training checkpoint holds of the trainer, as global tensors over this rank's memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_antisd.parallel.checkpoint_files import CheckpointError, model_fields, model_hash
from megatron_antisd.parallel.global_tensors import GlobalTensor
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.optimizer_state import MOMENTS, OptimizerSlice, optimizer_slices
from megatron_antisd.parallel.stored_weights import Shard, shards
from megatron_antisd.parallel.trainer import Trainer


def trainer_tensors(trainer: Trainer) -> tuple[dict[str, GlobalTensor], int]:
    """Weights and moments under their global names, views of the live memory, and the optimizer's step. Collective."""
    slices = optimizer_slices(trainer.optimizer)
    step = _optimizer_step(slices)
    tensors: dict[str, GlobalTensor] = {}
    for shard in shards(trainer.chunks, trainer.description, trainer.layout):
        if not shard.copy and (part := slices.get(shard.parameter)) is not None:
            tensors |= optimizer_tensors(shard, part, part.moments() if step else {}, main=True)
    return tensors, step


def optimizer_tensors(shard: Shard, part: OptimizerSlice, moments: dict[str, torch.Tensor], *, main: bool) -> dict[str, GlobalTensor]:
    tensors = {shard.name: shard.place(part.main.detach(), part.start)} if main else {}
    return tensors | {f"{key}.{shard.name}": shard.place(moments[key], part.start) for key in MOMENTS if moments}


def generator_tensors(layout: ProcessLayout, states: dict[str, torch.Tensor]) -> dict[str, GlobalTensor]:
    return {f"rng.{layout.rank}.{name}": GlobalTensor(shape=state.shape, pieces={torch.Size([0]): state}) for name, state in states.items()}


def describe_layout(trainer: Trainer) -> dict[str, Any]:
    """The layout as the manifest records it."""
    parallel = trainer.config.parallel.model_dump(mode="json", exclude={"timeout_seconds"})
    return parallel | {"world_size": trainer.layout.world_size, "device": trainer.layout.device.type}


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """What of the manifest is known before a step is saved."""
    fields = model_fields(trainer.description)
    return {"method": trainer.config.algorithm.method, "layout": describe_layout(trainer), "dtype": trainer.config.model.dtype,
            "model": fields, "model_hash": model_hash(fields)}


def _optimizer_step(slices: dict[torch.nn.Parameter, OptimizerSlice]) -> int:
    """The one step of all parameters on all ranks."""
    mine = {each.step() for each in slices.values()}
    everyone: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    steps = set().union(*everyone)
    if len(steps) != 1:
        raise CheckpointError(f"parameters are at different optimizer steps, {sorted(steps)}: nothing was saved")
    return steps.pop()
