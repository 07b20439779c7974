"""Megatron's AdamW over a chosen implementation, and the one guarded update."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_antisd.config import ConfigError, OptimizerConfig
from megatron_antisd.parallel.offload import OffloadedAdamW

_BACKENDS = {
    "torch": ("torch.optim", "AdamW", ""),
    "te": ("transformer_engine.pytorch.optimizers", "FusedAdam", "install the `te` extra"),
    "apex": ("apex.optimizers", "FusedAdam", "NVIDIA's apex comes with NVIDIA's PyTorch container or from source; "
             "the package called `apex` on the index is another project"),
}


def select_adam(backend: str, *, offload: bool = False) -> None:
    """Make Megatron use this AdamW. Megatron itself takes whichever it finds first. Raises ConfigError where it is absent, or cannot offload."""
    module, name, hint = _BACKENDS[backend]
    try:
        adam = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"optimizer.backend={backend}: {module}.{name} cannot be imported ({error}); {hint}") from error
    if offload and backend != "torch":
        raise ConfigError(f"optimizer.offload=true needs optimizer.backend=torch, got {backend}")
    megatron_optimizer.Adam = OffloadedAdamW if offload else adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = backend == "torch" and not offload  # True stands for the class torch.optim.AdamW itself


def build_optimizer(config: OptimizerConfig, chunks: list[DistributedDataParallel], dtype: torch.dtype, distributed: bool) -> MegatronOptimizer:
    """AdamW with fp32 main weights. Weight decay spares one-dimensional parameters (Megatron's rule)."""
    select_adam(config.backend, offload=config.offload)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
        ),
        chunks,
        use_gloo_process_groups=torch.cuda.is_available(),
    )
    for group in optimizer.param_groups:
        # Megatron marks the groups but leaves it to its own scheduler, which is not used here, to heed the mark.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


@torch.no_grad()
def guarded_update(optimizer: MegatronOptimizer, clip_grad: float, finite_loss: bool,
                   accept: Callable[[float], bool] = lambda norm: True) -> tuple[float, bool]:
    """Clip by the global norm and step; leave weights, moments and step counts untouched when loss or norm is not finite, or when `accept`,
    asked for every norm before anything is clipped, returns False.

    Returns (gradient norm before clipping, whether the update was applied); the same on every rank, because the norm is
    global and `finite_loss` speaks of the global loss. `accept` must answer alike on all of them.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    accepted = accept(norm)
    if not (accepted and finite_loss and math.isfinite(norm)):
        return norm, False
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm, True


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])
