"""The rules of rollouts, part of `rules`: what vLLM can run, and keys without effect or in each other's way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from megatron_antisd.config.schema import RunConfig

# vLLM 0.32, v1/attention/backends/cpu_attn.py. 16 starts and then fails at the first request.
VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def rollout_problems(config: RunConfig, *, moe: bool) -> Iterator[str]:
    """Keys without effect or in each other's way, whatever the model's sizes. `moe`: a mixture of experts."""
    yield from _server_problems(config)
    yield from _asynchrony_problems(config)
    yield from _routing_problems(config, moe=moe)
    yield from _correction_problems(config)
    yield from _tail_problems(config)


def _server_problems(config: RunConfig) -> Iterator[str]:
    rollout, asynchrony = config.rollout, config.asynchrony
    if rollout.mode == "servers" and rollout.engine != "vllm":
        yield f"rollout.mode=servers needs rollout.engine=vllm, got {rollout.engine}: the training model generates in the trainer's processes alone"
    if asynchrony.max_staleness and rollout.mode != "servers":
        yield (f"asynchrony.max_staleness={asynchrony.max_staleness} needs rollout.mode=servers, got {rollout.mode}: an engine inside the trainer's "
               "processes cannot generate while they train")
    host, _, port = config.servers.store.rpartition(":")
    if rollout.mode == "servers" and not (host and port.isdigit() and 0 < int(port) < 65536):
        yield f"servers.store={config.servers.store!r} is not of the form HOST:PORT, 10.0.0.1:29610 say"
    if config.sync.transport != "auto" and rollout.mode != "servers":
        yield f"sync.transport={config.sync.transport} has no effect with rollout.mode={rollout.mode}, whose engines are in the trainer's processes"


def _asynchrony_problems(config: RunConfig) -> Iterator[str]:
    asynchrony, updates = config.asynchrony, config.algorithm.updates_per_batch
    if 0 < asynchrony.max_staleness < updates:
        yield (f"asynchrony.max_staleness={asynchrony.max_staleness} leaves no room to draw a step ahead: with algorithm.updates_per_batch={updates} "
               f"a step is {updates} policy versions; take {updates} or a multiple")
    for key, value, default in (("partial", asynchrony.partial, "continue"), ("replay", asynchrony.replay, None)):
        if value != default and not asynchrony.max_staleness:
            yield f"asynchrony.{key}={value} has no effect with asynchrony.max_staleness=0: nothing is drawn ahead"


def routing_replay(config: RunConfig, *, moe: bool) -> Literal["engine", "scoring", "off"]:
    """What `routing.replay` comes to for a model. In float32 the routers of trainer and engine agree as they are."""
    if config.routing.replay != "auto":
        return config.routing.replay
    return "engine" if moe and config.model.dtype == "bfloat16" and config.rollout.engine == "vllm" else "off"


def _routing_problems(config: RunConfig, *, moe: bool) -> Iterator[str]:
    routing, replay = config.routing, routing_replay(config, moe=moe)
    if replay != "off" and not moe:
        yield f"routing.replay={replay} needs a mixture of experts, which the model is not: set it to auto or off"
    if replay == "engine" and config.rollout.engine != "vllm":
        yield (f"routing.replay=engine needs rollout.engine=vllm, got {config.rollout.engine}: the training model generates with its own routers; "
               "set scoring, auto or off")
    if routing.teacher != "free":
        needed = ("engine",) if routing.teacher == "own" else ("engine", "scoring")
        if replay not in needed:
            yield (f"routing.teacher={routing.teacher} needs routing.replay={' or '.join(needed)}, which is {replay} here (routing.replay="
                   f"{routing.replay}); set routing.teacher=free")
        elif not config.needs_teacher:
            yield f"routing.teacher={routing.teacher} has no effect with algorithm.method={config.algorithm.method}, which has no teacher"
    if routing.teacher == "own" and config.asynchrony.max_staleness:
        yield (f"routing.teacher=own cannot go with asynchrony.max_staleness={config.asynchrony.max_staleness}: the engine may hold other weights "
               "than the teacher, whose experts it is asked for")


def _idle(config: RunConfig, section: str, keys: tuple[str, ...], why: str) -> Iterator[str]:
    """One problem for each of these keys that differs from its default."""
    values = getattr(config, section)
    for key in keys:
        if getattr(values, key) != type(values).model_fields[key].default:
            yield f"{section}.{key}={getattr(values, key)} has no effect {why}"


def _correction_problems(config: RunConfig) -> Iterator[str]:
    if config.correction_mode == "off":
        yield from _idle(config, "correction", ("upper", "lower"), f"with correction.mode={config.correction.mode}, which is off here")
    if config.correction_mode == "truncate":
        yield from _idle(config, "correction", ("lower",), "where correction.mode comes to truncate: it is a bound of mask")
    if config.correction.level == "sequence" and config.correction_mode == "off":
        yield (f"correction.level=sequence has no effect with correction.mode={config.correction.mode}, which is off here: set correction.mode "
               "to truncate or mask")


def _tail_problems(config: RunConfig) -> Iterator[str]:
    rollout, tails = config.rollout, config.tails
    if not tails.dynamic_sampling:
        yield from _idle(config, "tails", ("dynamic_rounds",), "with tails.dynamic_sampling=false")
    if tails.overlong != "penalty":
        yield from _idle(config, "tails", ("overlong_buffer", "overlong_penalty"), f"with tails.overlong={tails.overlong}, only with penalty")
    if tails.oversample > 1 and config.problems_drawn(rollout.problems_per_step) == rollout.problems_per_step:
        yield (f"tails.oversample={tails.oversample:g} starts no group more than rollout.problems_per_step={rollout.problems_per_step}; the least "
               f"that does is {1 + 1 / rollout.problems_per_step:.3g}")
    if tails.overlong == "penalty" and tails.overlong_buffer > rollout.max_new_tokens:
        yield (f"tails.overlong_buffer={tails.overlong_buffer} must not exceed rollout.max_new_tokens={rollout.max_new_tokens}: the penalty grows "
               "over the last tokens of a response")
    if tails.overlong == "mask" and rollout.ignore_eos:
        yield "tails.overlong=mask with rollout.ignore_eos=true leaves nothing in the loss: every response is truncated"
    if config.asynchrony.max_staleness:
        waiting = {"tails.oversample": tails.oversample > 1, "tails.dynamic_sampling": tails.dynamic_sampling,
                   "tails.schedule": tails.schedule != "given"}
        if any(waiting.values()):
            yield (f"{', '.join(key for key, given in waiting.items() if given)} cannot go with asynchrony.max_staleness="
                   f"{config.asynchrony.max_staleness}: batches are drawn ahead there, and nobody waits for the slowest response")


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
    if config.rollout.expert_parallel and (not moe or tp == 1 or model["num_experts"] % tp):
        yield (f"rollout.expert_parallel=true needs a mixture of experts whose number divides by rollout.tensor_parallel_size={tp}, which is at "
               f"least 2; the model has {model['num_experts'] if moe else 'none'}")
    if cpu and model["head_dim"] not in VLLM_CPU_HEAD_SIZES:
        yield (f"the model's head_dim={model['head_dim']} is not one vLLM has on CPU "
               f"({', '.join(map(str, VLLM_CPU_HEAD_SIZES))}); set rollout.engine=megatron")
