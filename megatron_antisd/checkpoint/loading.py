"""A checkpoint into a trainer, whatever layout wrote it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from megatron_antisd.checkpoint.contents import describe_layout, generator_tensors, optimizer_tensors
from megatron_antisd.checkpoint.generators import derive_generators, generator_states, set_generator_states
from megatron_antisd.parallel.checkpoint_files import STATE, WEIGHTS_ONLY, CheckpointError, read_json, read_manifest
from megatron_antisd.parallel.global_tensors import GlobalTensor
from megatron_antisd.parallel.offload import OffloadedAdamW
from megatron_antisd.parallel.optimizer_state import MOMENTS, OptimizerSlice, optimizer_slices
from megatron_antisd.parallel.stored_weights import load_weights, on_main, read_tensors, shards
from megatron_antisd.parallel.trainer import Trainer

log = logging.getLogger(__name__)


def load_checkpoint(path: Path, trainer: Trainer, *, restore_rng: bool = True) -> dict[str, Any]:
    """Fill `trainer` (weights, main weights, moments, optimizer step) and return the saved `state`. Collective.

    On the layout that wrote it, resuming is bitwise exact. On another layout sums round differently, and the generators of all ranks are
    derived anew from the run's seed and the step. Raises CheckpointError, before anything is loaded, for a damaged checkpoint or another
    model's.
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
            moments[main] = _moments(part) if manifest["optimizer_step"] else {}
            # An fp32 parameter is its own main weight and already loaded.
            own = main.untyped_storage().data_ptr() != shard.parameter.untyped_storage().data_ptr()
            tensors |= optimizer_tensors(shard, part, moments[main], main=own)
    same_layout = manifest["layout"] == describe_layout(trainer)
    generators = generator_states(layout) if restore_rng and same_layout else {}
    if manifest["format"] == 1:  # knew torch's and Megatron's generators only
        generators = {name: state for name, state in generators.items() if name not in ("python", "numpy")}
    read_tensors(path, tensors | generator_tensors(layout, generators), manifest, describe_layout(trainer))
    for each in slices.values():
        each.restore(moments[each.main], manifest["optimizer_step"])
    if generators:
        set_generator_states(layout, generators)
    elif restore_rng:
        derive_generators(trainer.config.run.seed, manifest["step"])
        if layout.is_main:
            log.warning("%s was written with other settings of `parallel`: random number generators start anew from run.seed and the step", path)
    return on_main(layout, lambda: read_json(path / STATE))


def _moments(part: OptimizerSlice) -> dict[str, torch.Tensor]:
    """Memory to read both moments into: what is there already, in a rollback; in host memory where they live there."""
    if part.step():
        return part.moments()
    device = "cpu" if isinstance(part.inner, OffloadedAdamW) else part.main.device
    return {key: torch.zeros_like(part.main, device=device) for key in MOMENTS}
