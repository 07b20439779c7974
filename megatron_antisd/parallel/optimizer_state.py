"""Adam's state by parameter, the same for Megatron's plain and distributed optimizers and for each implementation of AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_antisd.config import ConfigError
from megatron_antisd.parallel.offload import MOMENTS, OffloadedAdamW, on_host


@dataclass(frozen=True, kw_only=True)
class AdamFormat:
    """How one implementation keeps what a checkpoint holds: fp32 `exp_avg` and `exp_avg_sq` beside the fp32 main weight, and the step."""

    backend: str
    """Its name in `optimizer.backend`."""
    package: str
    """Where its class is defined."""
    step_in_group: bool
    """One step for all parameters of a group, absent before the first and a tensor of one int32 with `capturable`; else a float32 tensor for each
    parameter, which AdamW counts up in place."""
    only: Mapping[str, Any]
    """Options of the optimizer, or of a group, and the one value under which this is all of the state."""


FORMATS = (
    AdamFormat(backend="torch", package="torch", step_in_group=False, only={"amsgrad": False}),
    # Moments of other types carry a scale beside them; with master_weights it would go on from its own copy of the weights.
    AdamFormat(backend="te", package="transformer_engine", step_in_group=True,
               only={"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32, "master_weights": False}),
    # use_master is master_weights in older builds.
    AdamFormat(backend="apex", package="apex", step_in_group=True, only={"master_weights": False, "use_master": False}),
)


def adam_format(inner: torch.optim.Optimizer) -> AdamFormat:
    """Raises ConfigError for a class, or options of it, whose state would be saved or restored in part."""
    kind = type(inner)
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__ if base.__name__ in ("AdamW", "FusedAdam")]
    found = next((each for package in packages for each in FORMATS if each.package == package), None)
    if found is None:
        raise ConfigError(f"the state of {kind.__module__}.{kind.__name__} is not known here; set optimizer.backend to "
                          f"{', '.join(each.backend for each in FORMATS[:-1])} or {FORMATS[-1].backend}")
    for option, supported in found.only.items():
        for owner in (vars(inner), *inner.param_groups):
            if owner.get(option, supported) != supported:
                raise ConfigError(f"optimizer.backend={found.backend}: the optimizer has {option}={owner[option]}, of which checkpoints would lose "
                                  f"a part; build it with {option}={supported}, or set optimizer.backend=torch")
    return found


@dataclass(frozen=True, kw_only=True)
class OptimizerSlice:
    """The part of a parameter that this rank's optimizer updates: all of it, or a flat range with the distributed optimizer."""

    main: torch.Tensor
    """fp32 main weight: the key of the optimizer's state."""
    start: int
    """Flat position of its first element in the parameter."""
    inner: torch.optim.Optimizer
    group: dict[str, Any]
    format: AdamFormat

    def moments(self) -> dict[str, torch.Tensor]:
        """Both moments, shaped as `main`. Raises KeyError before the first step, ConfigError where the state holds anything but fp32 moments."""
        state = self.inner.state.get(self.main, {})
        if not state and self.format.step_in_group and self.step():
            return {key: torch.zeros_like(self.main) for key in MOMENTS}  # apex: a parameter that never had a gradient
        moments = {key: state[key] for key in MOMENTS}
        found = [key for key in state if key not in (*MOMENTS, "step")]
        found += [f"{key} in {moment.dtype}, {tuple(moment.shape)}" for key, moment in moments.items()
                  if moment.dtype != torch.float32 or moment.shape != self.main.shape]
        if found:
            raise ConfigError(f"optimizer.backend={self.format.backend}: for a main weight of shape {tuple(self.main.shape)} the optimizer keeps "
                              f"{'; '.join(found)}; checkpoints hold its two moments in fp32 and nothing else: set optimizer.backend=torch")
        return moments

    def step(self) -> int:
        """Adam's step, 0 before the first."""
        holder = self.group if self.format.step_in_group else self.inner.state.get(self.main, {})
        return int(holder.get("step", 0))

    def restore(self, moments: dict[str, torch.Tensor], step: int) -> None:
        """Take over `moments` (empty where `step` is 0), whichever implementation they come from."""
        self.inner.state.pop(self.main, None)
        if self.format.step_in_group:
            capturable = getattr(self.inner, "capturable", False)
            self.group["step"] = torch.tensor([step], dtype=torch.int32, device=self.main.device) if capturable else step
        elif step:
            beside = self.group.get("capturable") or self.group.get("fused")
            moments = moments | {"step": torch.tensor(float(step), device=self.main.device if beside else "cpu")}
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
        form = adam_format(inner)
        if isinstance(part, DistributedOptimizer):
            for parameter, (number, order) in part.model_param_group_index_map.items():
                group = inner.param_groups[number]
                start = part._get_model_param_range_map(parameter)["param"].start
                slices[parameter] = OptimizerSlice(main=group["params"][order], start=start, inner=inner, group=group, format=form)
            continue
        parameters = _of_main_weights(part)
        for group in inner.param_groups:
            for main in group["params"]:
                slices[parameters.get(main, main)] = OptimizerSlice(main=main, start=0, inner=inner, group=group, format=form)
    return slices


def _of_main_weights(part: MegatronOptimizer) -> dict[torch.Tensor, torch.nn.Parameter]:
    """fp32 main weight -> its 16-bit parameter; empty for the fp32 optimizer, whose parameters are their own main weights."""
    if not hasattr(part, "float16_groups"):
        return {}
    groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
    return {main: parameter for parameters, mains in groups for parameter, main in zip(parameters, mains, strict=True)}
