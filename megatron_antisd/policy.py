"""The two holders of the policy's weights, built in the order that works, and the proof that they hold the same.

vLLM looks at torch.cuda while it starts and joins the default process group, hence before Megatron and its CPU support.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_antisd.config import RunConfig
from megatron_antisd.inputs import Inputs
from megatron_antisd.records import Problem
from megatron_antisd.rollout.engine import Engine
from megatron_antisd.rollout.probe import DEFAULT_LIMIT, SyncProbe

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer


def build_engine_and_trainer(config: RunConfig, max_context: int, *, training: bool = True) -> tuple[Engine, Trainer]:
    """Collective, after the process group has started. Without `training` the trainer has no gradients and no optimizer."""
    engine = build_vllm_engine(config, max_context) if config.rollout.engine == "vllm" else None
    from megatron_antisd.compat import megatron_cpu

    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.layout import build_layout
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, config.run.seed)
    trainer = Trainer(config, layout, describe(config.model.path, layout.tensor_size), training=training)
    if engine is None:
        from megatron_antisd.rollout.megatron_engine import MegatronEngine

        engine = MegatronEngine(trainer, max_context=max_context, max_sequences=config.rollout.max_sequences)
    return engine, trainer


def build_vllm_engine(config: RunConfig, max_context: int) -> Engine:
    """vLLM with the weights of a Hugging Face checkpoint, or with none yet: it cannot read the tensors of one of ours."""
    from megatron_antisd.parallel.checkpoint_files import is_checkpoint
    from megatron_antisd.rollout.vllm_engine import VllmEngine

    return VllmEngine(config.model.path, rollout=config.rollout, dtype=config.model.dtype, seed=config.run.seed, max_context=max_context,
                      load_format="dummy" if is_checkpoint(config.model.path) else "auto", timeout_seconds=config.parallel.timeout_seconds)


def build_probe(config: RunConfig, inputs: Inputs, problem: Problem, trainer: Trainer) -> SyncProbe:
    """The proof after each weight sync, on `problem`'s prompt."""
    return SyncProbe(inputs.prompts.student_prompt(problem), score=trainer.score, copies=dist.get_world_size(), max_context=inputs.max_context,
                     temperature=config.rollout.temperature, limit=config.rollout.probe_max_mean or DEFAULT_LIMIT[config.model.dtype])
