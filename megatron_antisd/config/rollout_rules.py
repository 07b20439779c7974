"""The rules of rollouts, part of `rules`: what vLLM can run, and keys without effect or in each other's way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_antisd.config.schema import RunConfig

# vLLM 0.32, v1/attention/backends/cpu_attn.py. 16 starts and then fails at the first request.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def rollout_problems(config: RunConfig, *, moe: bool) -> Iterator[str]:
    """Keys without effect or in each other's way, whatever the model's sizes. `moe`: a mixture of experts."""
    yield from _server_problems(config)


def _server_problems(config: RunConfig) -> Iterator[str]:
    rollout, asynchrony = config.rollout, config.asynchrony
    if rollout.mode == "servers" and rollout.engine != "vllm":
        yield f"rollout.mode=servers needs rollout.engine=vllm, got {rollout.engine}: the training model generates in the trainer's processes alone"
    if asynchrony.max_staleness and rollout.mode != "servers":
        yield (f"asynchrony.max_staleness={asynchrony.max_staleness} needs rollout.mode=servers, got {rollout.mode}: an engine inside the trainer's "
               "processes cannot generate while they train")


def vllm_problems(config: RunConfig, model: Mapping[str, Any], *, moe: bool, cpu: bool) -> Iterator[str]:
    """Between the model and vLLM's own layout."""
    tp = config.rollout.tensor_parallel_size
    heads, groups = model["num_attention_heads"], model["num_key_value_heads"]
    if heads % tp:
        yield f"the model's num_attention_heads={heads} must be divisible by rollout.tensor_parallel_size={tp}"
    if groups % tp and tp % groups:
        yield f"the model's num_key_value_heads={groups} must be a multiple or a divisor of rollout.tensor_parallel_size={tp}"
    key = "moe_intermediate_size" if moe else "intermediate_size"
    if model[key] % tp:
        yield f"the model's {key}={model[key]} must be divisible by rollout.tensor_parallel_size={tp}"
    if moe and tp > model["num_experts"]:
        yield f"rollout.tensor_parallel_size={tp} must not exceed the model's num_experts={model['num_experts']}"
    if cpu and model["head_dim"] not in VLLM_CPU_HEAD_SIZES:
        yield (f"the model's head_dim={model['head_dim']} is not one vLLM has on CPU "
               f"({', '.join(map(str, VLLM_CPU_HEAD_SIZES))}); set rollout.engine=megatron")
