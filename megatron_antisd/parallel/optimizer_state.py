"""Adam's state by parameter, the same for Megatron's plain and distributed optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_antisd.parallel.offload import MOMENTS, OffloadedAdamW, on_host


@dataclass(frozen=True, kw_only=True)
class OptimizerSlice:
    """The part of a parameter that this rank's optimizer updates: all of it, or a flat range with the distributed optimizer."""

    main: torch.Tensor
    """fp32 main weight: the key of the optimizer's state."""
    start: int
    """Flat position of its first element in the parameter."""
    inner: torch.optim.Optimizer
    group: dict[str, Any]

    def moments(self) -> dict[str, torch.Tensor]:
        """Both moments, shaped as `main`. Raises KeyError before the first step."""
        return {key: self.inner.state[self.main][key] for key in MOMENTS}

    def step(self) -> int:
        """Adam's step, 0 before the first: torch keeps it with each parameter, the fused optimizers with the group."""
        return int(self.inner.state.get(self.main, {}).get("step", self.group.get("step", 0)))

    def restore(self, moments: dict[str, torch.Tensor], step: int) -> None:
        """Take over `moments` (empty where `step` is 0)."""
        self.inner.state.pop(self.main, None)
        if not isinstance(self.inner, torch.optim.AdamW):
            self.group["step"] = step
        elif step:
            # A tensor of its own for each parameter: AdamW counts it up in place.
            moments = moments | {"step": torch.tensor(float(step))}
        if moments:
            offload = isinstance(self.inner, OffloadedAdamW)
            self.inner.state[self.main] = {key: on_host(value) for key, value in moments.items()} if offload else moments


def optimizer_slices(optimizer: MegatronOptimizer) -> dict[torch.nn.Parameter, OptimizerSlice]:
    """Parameter -> its slice. A parameter of which this rank's distributed optimizer holds nothing is absent."""
    slices: dict[torch.nn.Parameter, OptimizerSlice] = {}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer):
            for parameter, (number, order) in part.model_param_group_index_map.items():
                group = inner.param_groups[number]
                start = part._get_model_param_range_map(parameter)["param"].start
                slices[parameter] = OptimizerSlice(main=group["params"][order], start=start, inner=inner, group=group)
            continue
        parameters = _of_main_weights(part)
        for group in inner.param_groups:
            for main in group["params"]:
                slices[parameters.get(main, main)] = OptimizerSlice(main=main, start=0, inner=inner, group=group)
    return slices


def _of_main_weights(part: MegatronOptimizer) -> dict[torch.Tensor, torch.nn.Parameter]:
    """fp32 main weight -> its 16-bit parameter; empty for the fp32 optimizer, whose parameters are their own main weights."""
    if not hasattr(part, "float16_groups"):
        return {}
    groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    return {main: parameter for parameters, mains in groups for parameter, main in zip(parameters, mains, strict=True)}
