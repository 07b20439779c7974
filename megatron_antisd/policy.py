"""The two holders of the policy's weights, built in the order that works, and the proof that they hold the same.

vLLM looks at torch.cuda while it starts and joins the default process group, hence before Megatron and its CPU support.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_antisd.config import ConfigError, RunConfig
from megatron_antisd.config.rollout_rules import routing_replay
from megatron_antisd.inputs import Inputs
from megatron_antisd.models.description import describe
from megatron_antisd.records import Problem
from megatron_antisd.rollout.engine import Engine
from megatron_antisd.rollout.probe import DEFAULT_LIMIT, SyncProbe, synchronise
from megatron_antisd.rollout.restarting import RestartingEngine

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer


def build_policy(config: RunConfig, inputs: Inputs, problem: Problem, *, training: bool = True) -> tuple[RestartingEngine, Trainer, SyncProbe]:
    """Collective, after the process group has started. The probe's prompt is `problem`'s. Without `training` the trainer has no gradients and no
    optimizer. An engine that is restarted gets the trainer's present weights, proved by the probe."""
    inside = config.rollout.mode == "colocated" or not training  # an evaluation alone needs no servers
    moe = describe(config.model.path, 1).experts is not None
    replay = routing_replay(config, moe=moe) if training else "off"
    routes = replay == "engine"
    first = _vllm_engine(config, inputs.max_context, dummy=False, routes=routes) if config.rollout.engine == "vllm" and inside else None
    from megatron_antisd.compat import megatron_cpu

    megatron_cpu.install()
    from megatron_antisd.parallel.layout import build_layout
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, config.run.seed, config.collective_seconds)
    trainer = Trainer(config, layout, describe(config.model.path, layout.tensor_size), training=training)
    if replay != "off" and trainer.routing.obstacle is not None:
        raise ConfigError(f"routing.replay={replay}: {trainer.routing.obstacle}; set routing.replay=off")
    probe = _probe(config, inputs, problem, trainer, routes=routes)
    servers = None
    if not inside:
        from megatron_antisd.server_sync import servers_builder

        servers = servers_builder(config, inputs, trainer, routes=routes)

    def build() -> Engine:
        if servers is not None:
            return servers()
        if config.rollout.engine == "vllm":  # whose CPU build takes Megatron's CPU support once it has looked at torch.cuda
            return _vllm_engine(config, inputs.max_context, dummy=True, routes=routes)
        from megatron_antisd.rollout.megatron_engine import MegatronEngine

        return MegatronEngine(trainer, max_context=inputs.max_context, max_sequences=config.rollout.max_sequences,
                              stall_seconds=config.rollout.stall_seconds)

    def restore(engine: Engine, version: int) -> None:
        synchronise(engine, trainer.engine_weights, version, probe)

    engine = RestartingEngine(first or build(), build=build, restore=restore, max_restarts=config.rollout.max_restarts)
    return engine, trainer, probe


def build_vllm_engine(config: RunConfig, max_context: int) -> RestartingEngine:
    """vLLM alone, with the weights of a Hugging Face checkpoint, which it reads again when it is restarted."""

    def build() -> Engine:
        return _vllm_engine(config, max_context, dummy=False)

    return RestartingEngine(build(), build=build, restore=lambda engine, version: None, max_restarts=config.rollout.max_restarts)


def _vllm_engine(config: RunConfig, max_context: int, *, dummy: bool, routes: bool = False) -> Engine:
    """`dummy`: with no weights yet, as also for a checkpoint of ours, whose tensors it cannot read."""
    from megatron_antisd.parallel.checkpoint_files import is_checkpoint
    from megatron_antisd.rollout.vllm_engine import VllmEngine

    return VllmEngine(config.model.path, rollout=config.rollout, dtype=config.model.dtype, seed=config.run.seed, max_context=max_context,
                      load_format="dummy" if dummy or is_checkpoint(config.model.path) else "auto",
                      timeout_seconds=config.collective_seconds, routes=routes)


def _probe(config: RunConfig, inputs: Inputs, problem: Problem, trainer: Trainer, *, routes: bool) -> SyncProbe:
    """The proof after each weight sync, on `problem`'s prompt."""
    return SyncProbe(inputs.prompts.student_prompt(problem), score=trainer.score, requests=dist.get_world_size(), max_context=inputs.max_context,
                     temperature=config.rollout.temperature, routes=routes, limit=config.rollout.probe_max_mean or DEFAULT_LIMIT[config.model.dtype])
