"""The rules between the keys that trade memory for time (docs/memory.md): arithmetic alone, one line for each broken one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_antisd.config.schema import RunConfig

_ROW_BYTES = 16
"""torch's grouped_mm wants rows of every operand to be multiples of this."""


def lever_problems(config: RunConfig, model_type: str | None) -> Iterator[str]:
    """Keys without effect or in each other's way."""
    model, parallel = config.model, config.parallel
    if model.recompute_modules is not None and model.recompute != "selective":
        yield (f"model.recompute_modules={list(model.recompute_modules)} needs model.recompute=selective, got {model.recompute}; "
               "set it, or leave the modules out")
    if model.recompute == "selective" and model_type == "olmo3" and "norms" in (model.recompute_modules or ()):
        yield "model.recompute_modules: norms has no effect on an olmo3 model, whose norms stand behind attention and MLP; take attention or mlp"
    if model.recompute == "selective" and model.spec == "te" and "norms" in (model.recompute_modules or ()):
        yield ("model.recompute_modules: norms needs model.spec=local, got te, whose norms are parts of its linear layers; take attention or mlp")
    if parallel.gradient_bucket_parameters is not None and not parallel.overlap_gradients:
        yield (f"parallel.gradient_bucket_parameters={parallel.gradient_bucket_parameters} needs parallel.overlap_gradients=true: "
               "without it all gradients are reduced at once")
    if config.optimizer.offload and config.optimizer.backend != "torch":
        yield (f"optimizer.offload=true needs optimizer.backend=torch, got {config.optimizer.backend}: the fused optimizers keep their moments "
               "on the GPU")


def expert_form_problems(config: RunConfig, model: Mapping[str, Any]) -> Iterator[str]:
    """Where the experts cannot take the form asked for. `model` is a whole config.json."""
    form = config.model.grouped_experts
    if form != "auto" and config.model.spec != "local":
        yield f"model.grouped_experts={form} needs model.spec=local, got {config.model.spec}, whose experts are its own; leave the key out"
    if form != "auto" and model["model_type"] != "qwen3_moe":
        yield f"model.grouped_experts={form} needs a mixture-of-experts model, but model_type is {model['model_type']!r}; leave the key out"
    if form == "grouped" and model["model_type"] == "qwen3_moe":
        element, ranks = {"float32": 4, "bfloat16": 2}[config.model.dtype], config.parallel.expert_tensor_parallel_size
        for key, size in (("hidden_size", model["hidden_size"]), ("moe_intermediate_size", model["moe_intermediate_size"] // ranks)):
            if size * element % _ROW_BYTES:
                of = f" / parallel.expert_tensor_parallel_size={ranks}" if key == "moe_intermediate_size" else ""
                yield (f"model.grouped_experts=grouped needs {key}{of} to be a multiple of {_ROW_BYTES // element} in {config.model.dtype}, "
                       f"got {size}; take auto or sequential")
