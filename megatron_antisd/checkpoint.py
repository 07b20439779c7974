"""Checkpoints of a run: weights, optimizer, random numbers and the loop's own state, exact on resume and free of the layout.

    run/checkpoints/step_000012/
        manifest.json     what wrote it: layout, model, method, the size of every other file; written last
        state.json        the training loop's state (gate, sampler, counters), as given
        config.json ...   of model.path: configuration, tokenizer, generation settings; so the directory is a model.path itself
        tensors/          torch.distributed.checkpoint: the format beneath Megatron's `torch_dist`

Every tensor is stored under one global name with its true global shape, each rank writing the rectangles it holds, so any
layout reads what any other wrote: tensor-, pipeline-, expert-, data-parallel, sharded optimizer or not, padded vocabulary or not.
Megatron's own `optimizer.sharded_state_dict` is not used: with torch's AdamW it shares one `step` tensor among all parameters after
loading, which over-counts Adam's step silently, it cannot grow the expert-parallel size, and it forks writer processes.

The fp32 main weights are the weights: bf16 parameters are their rounding. Learning rate, betas and weight decay come from the
configuration of the run that loads.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import tensor_parallel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_antisd.durable import write_json
from megatron_antisd.models.huggingface import copy_model_files
from megatron_antisd.parallel.checkpoint_files import (
    FORMAT,
    WEIGHTS_ONLY,
    CheckpointError,
    checkpoints,
    file_sizes,
    latest_checkpoint,
    model_fields,
    model_hash,
    read_json,
    read_manifest,
    step_of,
)
from megatron_antisd.parallel.global_tensors import GlobalTensor, SavePlanner
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.optimizer_state import MOMENTS, OptimizerSlice, optimizer_slices
from megatron_antisd.parallel.stored_weights import Shard, failures, load_weights, on_main, read_tensors, shards
from megatron_antisd.parallel.trainer import Trainer

__all__ = ["CheckpointError", "describe_layout", "latest_checkpoint", "load_checkpoint", "load_weights", "save_checkpoint"]

log = logging.getLogger(__name__)


def save_checkpoint(directory: Path, step: int, trainer: Trainer, state: dict[str, Any], keep: int) -> Path:
    """Write `directory/step_<step>` and delete all but the newest `keep`; `state` must be JSON-able. Collective.

    Written beside its place and committed by one rename, so that whatever bears the name is whole. A checkpoint of the same step
    is replaced. Raises CheckpointError, on every rank, when writing fails; the older checkpoints are then still there.
    """
    layout = trainer.layout
    target = directory / f"step_{step:06d}"
    partial = directory / f"{target.name}.tmp"
    on_main(layout, lambda: _prepare(directory, partial))
    slices = optimizer_slices(trainer.optimizer)
    optimizer_step = _optimizer_step(slices)
    tensors = _rng_tensors(layout, _rng_state(layout))
    for shard in shards(trainer.chunks, trainer.description, layout):
        if not shard.copy and (part := slices.get(shard.parameter)) is not None:
            tensors |= _optimizer_tensors(shard, part, part.moments() if optimizer_step else {}, main=True)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial / "tensors"), planner=SavePlanner(flatten_state_dict=False))
    except CheckpointException as error:
        raise CheckpointError(f"could not write {partial}: {failures(error)}") from error
    manifest = {
        "format": FORMAT, "step": step, "optimizer_step": optimizer_step, "method": trainer.config.algorithm.method,
        "layout": describe_layout(trainer), "dtype": trainer.config.model.dtype, "model": model_fields(trainer.description),
        "model_hash": model_hash(model_fields(trainer.description)),
    }  # fmt: skip
    source = Path(trainer.config.model.path)
    on_main(layout, lambda: _commit(partial, target, source, manifest, state, keep))
    return target


def load_checkpoint(path: Path, trainer: Trainer, *, restore_rng: bool = True) -> dict[str, Any]:
    """Fill `trainer` (weights, main weights, moments, optimizer step) and return the saved `state`. Collective.

    On the layout that wrote it, resuming is bitwise exact. On another layout each rank keeps its own random numbers (a warning
    says so) and sums round differently. Raises CheckpointError, before anything is loaded, for a damaged checkpoint or another model's.
    """
    layout = trainer.layout
    if on_main(layout, lambda: read_manifest(path)).get("kind") == WEIGHTS_ONLY:
        raise CheckpointError(f"{path} was converted from Hugging Face and holds no state of a run; start from it with model.path={path}")
    manifest = load_weights(path, trainer.chunks, trainer.description, layout)
    slices = optimizer_slices(trainer.optimizer)
    tensors: dict[str, GlobalTensor] = {}
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for shard in shards(trainer.chunks, trainer.description, layout):
        if (part := slices.get(shard.parameter)) is not None:
            main = part.main
            moments[main] = {key: torch.zeros_like(main) for key in MOMENTS} if manifest["optimizer_step"] else {}
            # An fp32 parameter is its own main weight and already loaded.
            own = main.untyped_storage().data_ptr() != shard.parameter.untyped_storage().data_ptr()
            tensors |= _optimizer_tensors(shard, part, moments[main], main=own)
    same_layout = manifest["layout"] == describe_layout(trainer)
    rng = _rng_state(layout) if restore_rng and same_layout else {}
    read_tensors(path, tensors | _rng_tensors(layout, rng), manifest, describe_layout(trainer))
    for each in slices.values():
        each.restore(moments[each.main], manifest["optimizer_step"])
    if rng:
        _set_rng_state(layout, rng)
    elif restore_rng and layout.is_main:
        log.warning("%s was written on another layout: random number generators start from the seed", path)
    return on_main(layout, lambda: read_json(path / "state.json"))


def describe_layout(trainer: Trainer) -> dict[str, Any]:
    """The layout as the manifest records it."""
    parallel = trainer.config.parallel.model_dump(mode="json", exclude={"timeout_seconds"})
    return parallel | {"world_size": trainer.layout.world_size, "device": trainer.layout.device.type}


# -- tensors by global name -----------------------------------------------------------------------------------------------


def _optimizer_tensors(shard: Shard, part: OptimizerSlice, moments: dict[str, torch.Tensor], *, main: bool) -> dict[str, GlobalTensor]:
    tensors = {shard.name: shard.place(part.main.detach(), part.start)} if main else {}
    return tensors | {f"{key}.{shard.name}": shard.place(moments[key], part.start) for key in MOMENTS if moments}


def _optimizer_step(slices: dict[torch.nn.Parameter, OptimizerSlice]) -> int:
    """The one step of all parameters on all ranks."""
    mine = {each.step() for each in slices.values()}
    everyone: list[set[int]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    steps = set().union(*everyone)
    if len(steps) != 1:
        raise CheckpointError(f"parameters are at different optimizer steps, {sorted(steps)}: nothing was saved")
    return steps.pop()


# -- random numbers -------------------------------------------------------------------------------------------------------


def _rng_state(layout: ProcessLayout) -> dict[str, torch.Tensor]:
    states = {"torch": torch.get_rng_state()}
    if layout.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(layout.device)
    return states | {f"megatron.{name}": state for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}


def _rng_tensors(layout: ProcessLayout, states: dict[str, torch.Tensor]) -> dict[str, GlobalTensor]:
    return {f"rng.{layout.rank}.{name}": GlobalTensor(shape=state.shape, pieces={torch.Size([0]): state}) for name, state in states.items()}


def _set_rng_state(layout: ProcessLayout, states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], layout.device)
    tracker = {name.removeprefix("megatron."): state for name, state in states.items() if name.startswith("megatron.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


# -- files; rank 0 only ---------------------------------------------------------------------------------------------------


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _commit(partial: Path, target: Path, source: Path, manifest: dict[str, Any], state: dict[str, Any], keep: int) -> None:
    write_json(partial / "state.json", state)
    copy_model_files(source, partial)
    write_json(partial / "manifest.json", manifest | {"files": file_sizes(partial)})
    if target.exists():
        _remove(target)
    partial.rename(target)
    older = [path for path in checkpoints(target.parent) if step_of(path) < step_of(target)]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _remove(path)


def _remove(path: Path) -> None:
    """Takes the name away first: a half-deleted directory is never taken for a checkpoint."""
    doomed = path.with_name(f"{path.name}.deleted.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)
