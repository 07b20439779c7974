"""Checkpoints of a run: weights, optimizer, random numbers and the loop's own state, exact on resume and free of the layout.

    run/checkpoints/step_000012/
        manifest.json     what wrote it: layout, model, method, the size of every other file; written last
        state.json        the training loop's state (gate, sampler, counters), as given
        tensors/          torch.distributed.checkpoint: the format beneath Megatron's `torch_dist`

Every tensor is stored under one global name with its true global shape, each rank writing the rectangles it holds, so any
layout reads what any other wrote: tensor-, pipeline-, expert-, data-parallel, sharded optimizer or not, padded vocabulary or not.
Megatron's own `optimizer.sharded_state_dict` is not used: with torch's AdamW it shares one `step` tensor among all parameters after
loading, which over-counts Adam's step silently, it cannot grow the expert-parallel size, and it forks writer processes.

The fp32 main weights are the weights: bf16 parameters are their rounding. Learning rate, betas and weight decay come from the
configuration of the run that loads.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import tensor_parallel
from torch.distributed.checkpoint.api import CheckpointException

from megatron_antisd.models.build import ModelDescription, PolicyModel
from megatron_antisd.models.weight_map import Entry, Layout, Weight
from megatron_antisd.parallel.global_tensors import GlobalTensor, LoadPlanner, SavePlanner, place_shard
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.optimizer_state import MOMENTS, OptimizerSlice, optimizer_slices
from megatron_antisd.parallel.reshard import global_expert, local_weights, tensor_place, tied_copy
from megatron_antisd.parallel.trainer import Trainer

FORMAT = 1
_NAME = re.compile(r"step_(\d+)")
# Fields that say nothing of the weights' shapes or of what the model computes from them, and those that versions of transformers
# write under several names: `rope` and `experts` stand for them.
_IGNORED_FIELDS = {
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "initializer_range", "max_position_embeddings", "output_router_logits", "router_aux_loss_coef", "attention_dropout",
    "rope_theta", "rope_scaling", "rope_parameters", "num_experts", "num_local_experts",
}  # fmt: skip

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or cannot be loaded here; the message says why and what to do."""


def save_checkpoint(directory: Path, step: int, trainer: Trainer, state: dict[str, Any], keep: int) -> Path:
    """Write `directory/step_<step>` and delete all but the newest `keep`; `state` must be JSON-able. Collective.

    Written beside its place and committed by one rename, so that whatever bears the name is whole. A checkpoint of the same step
    is replaced. Raises CheckpointError, on every rank, when writing fails; the older checkpoints are then still there.
    """
    layout = trainer.layout
    target = directory / f"step_{step:06d}"
    partial = directory / f"{target.name}.tmp"
    _on_main(layout, lambda: _prepare(directory, partial))
    slices = optimizer_slices(trainer.optimizer)
    optimizer_step = _optimizer_step(slices)
    tensors = _rng_tensors(layout, _rng_state(layout))
    for shard in _shards(trainer.chunks, trainer.description, layout):
        if not shard.copy and (part := slices.get(shard.parameter)) is not None:
            tensors |= _optimizer_tensors(shard, part, part.moments() if optimizer_step else {}, main=True)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial / "tensors"), planner=SavePlanner(flatten_state_dict=False))
    except CheckpointException as error:
        raise CheckpointError(f"could not write {partial}: {_failures(error)}") from error
    manifest = {
        "format": FORMAT, "step": step, "optimizer_step": optimizer_step, "method": trainer.config.algorithm.method,
        "layout": describe_layout(trainer), "model": model_fields(trainer.description), "model_hash": _hash(model_fields(trainer.description)),
    }  # fmt: skip
    _on_main(layout, lambda: _commit(partial, target, manifest, state, keep))
    return target


def latest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint of the highest step in `directory`, or None. Leftovers of an interrupted save and damaged ones are passed over."""
    for path in reversed(_checkpoints(directory)):
        fault = _fault(path)
        if fault is None:
            return path
        log.warning("%s is not used as a checkpoint: %s", path, fault)
    return None


def load_checkpoint(path: Path, trainer: Trainer, *, restore_rng: bool = True) -> dict[str, Any]:
    """Fill `trainer` (weights, main weights, moments, optimizer step) and return the saved `state`. Collective.

    On the layout that wrote it, resuming is bitwise exact. On another layout each rank keeps its own random numbers (a warning
    says so) and sums round differently. Raises CheckpointError, before anything is loaded, for a damaged checkpoint or another model's.
    """
    layout = trainer.layout
    manifest = load_weights(path, trainer.chunks, trainer.description, layout)
    slices = optimizer_slices(trainer.optimizer)
    tensors: dict[str, GlobalTensor] = {}
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for shard in _shards(trainer.chunks, trainer.description, layout):
        if (part := slices.get(shard.parameter)) is not None:
            main = part.main
            moments[main] = {key: torch.zeros_like(main) for key in MOMENTS} if manifest["optimizer_step"] else {}
            # An fp32 parameter is its own main weight and already loaded.
            own = main.untyped_storage().data_ptr() != shard.parameter.untyped_storage().data_ptr()
            tensors |= _optimizer_tensors(shard, part, moments[main], main=own)
    same_layout = manifest["layout"] == describe_layout(trainer)
    rng = _rng_state(layout) if restore_rng and same_layout else {}
    _read_tensors(path, tensors | _rng_tensors(layout, rng), manifest, describe_layout(trainer))
    for each in slices.values():
        each.restore(moments[each.main], manifest["optimizer_step"])
    if rng:
        _set_rng_state(layout, rng)
    elif restore_rng and layout.is_main:
        log.warning("%s was written on another layout: random number generators start from the seed", path)
    return _on_main(layout, lambda: _read_json(path / "state.json"))


def load_weights(path: Path, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> dict[str, Any]:
    """Fill a model without optimizer; returns the manifest. Collective. Raises CheckpointError as `load_checkpoint` does."""
    manifest = _on_main(layout, lambda: _read_manifest(path))
    _check_model(path, manifest["model"], model_fields(description))
    tensors = {}
    for shard in _shards(chunks, description, layout):
        if shard.weight.layout is Layout.VOCAB:
            with torch.no_grad():
                shard.parameter.zero_()  # padding rows are in no checkpoint
        tensors[shard.name] = shard.place(shard.parameter.detach(), 0)
    here = {"tensor_parallel_size": layout.tensor_size, "pipeline_parallel_size": layout.pipeline_size,
            "expert_parallel_size": layout.expert_size, "expert_tensor_parallel_size": layout.expert_tensor_size}
    _read_tensors(path, tensors, manifest, here)
    return manifest


def model_fields(description: ModelDescription) -> dict[str, Any]:
    """What must agree between a checkpoint and the model that loads it."""
    fields = {key: value for key, value in sorted(description.hf.items()) if key not in _IGNORED_FIELDS and value is not None}
    return fields | {"rope": description.rope, "experts": description.experts}


def describe_layout(trainer: Trainer) -> dict[str, Any]:
    """The layout as the manifest records it."""
    parallel = trainer.config.parallel.model_dump(mode="json", exclude={"timeout_seconds"})
    return parallel | {"world_size": trainer.layout.world_size, "device": trainer.layout.device.type}


# -- tensors by global name -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Shard:
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


def _shards(chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> Iterator[_Shard]:
    def shard(entry: Entry, parameter: torch.nn.Parameter, copy: bool = False) -> _Shard:
        rank, size = tensor_place(entry.weight, layout)
        return _Shard(name=entry.name, weight=entry.weight, parameter=parameter, tensor_rank=rank, tensor_size=size, description=description,
                      copy=copy)

    for sharded, parameter in local_weights(chunks, description, layout):
        yield shard(sharded.entry(global_expert(sharded.local_expert, description, layout)), parameter)
    copy = tied_copy(chunks, description, layout)
    if copy is not None:
        yield shard(description.embedding(), copy, copy=True)


def _optimizer_tensors(shard: _Shard, part: OptimizerSlice, moments: dict[str, torch.Tensor], *, main: bool) -> dict[str, GlobalTensor]:
    tensors = {shard.name: shard.place(part.main.detach(), part.start)} if main else {}
    return tensors | {f"{key}.{shard.name}": shard.place(moments[key], part.start) for key in MOMENTS if moments}


def _read_tensors(path: Path, tensors: dict[str, GlobalTensor], manifest: dict[str, Any], here: dict[str, Any]) -> None:
    try:
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path / "tensors"), planner=LoadPlanner())
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be loaded: {_failures(error)}\nwritten on layout {manifest['layout']}, loaded on {here}") from error


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


def _on_main(layout: ProcessLayout, action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; its result, or its failure as CheckpointError, on every rank."""
    answer: list[Any] = [None, None]
    cause: Exception | None = None
    if layout.is_main:
        try:
            answer[0] = action()
        except (CheckpointError, OSError, TypeError, ValueError) as error:
            cause, answer[1] = error, str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(answer[1]) from cause
    return answer[0]


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    partial.mkdir()


def _commit(partial: Path, target: Path, manifest: dict[str, Any], state: dict[str, Any], keep: int) -> None:
    _write_json(partial / "state.json", state)
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()}
    _write_json(partial / "manifest.json", manifest | {"files": sizes})
    if target.exists():
        _remove(target)
    partial.rename(target)
    older = [path for path in _checkpoints(target.parent) if _step(path) < _step(target)]
    for path in older[: max(0, len(older) - (keep - 1))]:
        _remove(path)


def _remove(path: Path) -> None:
    """Takes the name away first: a half-deleted directory is never taken for a checkpoint."""
    doomed = path.with_name(f"{path.name}.deleted.tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _checkpoints(directory: Path) -> list[Path]:
    """Directories with a checkpoint's name, by step."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if directory.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _fault(path: Path) -> str | None:
    """Why this directory is no whole checkpoint; None where it is one."""
    if not (path / "manifest.json").is_file():
        return "it has no manifest.json"
    try:
        files = _read_json(path / "manifest.json")["files"]
    except (json.JSONDecodeError, KeyError) as error:
        return f"its manifest.json cannot be read ({type(error).__name__}: {error})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    fault = _fault(path) if path.is_dir() else "there is no such directory"
    if fault is not None:
        raise CheckpointError(f"{path} is not a whole checkpoint: {fault}; take another one, such as the step before it")
    manifest = _read_json(path / "manifest.json")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, this version reads format {FORMAT}")
    return manifest


def _check_model(path: Path, saved: dict[str, Any], here: dict[str, Any]) -> None:
    absent = "(absent)"
    differing = [f"{key}: {saved.get(key, absent)!r} in the checkpoint, {here.get(key, absent)!r} here"
                 for key in sorted(saved.keys() | here.keys()) if saved.get(key, absent) != here.get(key, absent)]
    if differing:
        raise CheckpointError(f"{path} is a checkpoint of another model than model.path describes; nothing was loaded. Differing fields:\n  "
                              + "\n  ".join(differing))


def _failures(error: CheckpointException) -> str:
    """What went wrong on which rank, without the tracebacks, which the cause keeps."""
    return "; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, (failure, _) in error.failures.items())


def _hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
