"""An evaluation without a training run around it: any checkpoint, any engine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_antisd.config import ConfigError, RunConfig
from megatron_antisd.evaluation.evaluator import Evaluator, build_evaluator
from megatron_antisd.inputs import Inputs, read_inputs
from megatron_antisd.policy import build_engine_and_trainer, build_probe, build_vllm_engine
from megatron_antisd.rollout.engine import Engine
from megatron_antisd.rollout.probe import synchronise

DIRECTORY = "evaluation"


@dataclass(frozen=True, kw_only=True)
class Standalone:
    evaluator: Evaluator
    step: int
    """Of the training checkpoint; 0 for Hugging Face weights."""
    policy: str
    """Names the weights: their directory, and a digest of their files' names, sizes and times."""

    def close(self) -> None:
        self.evaluator.grader.close()
        self.evaluator.engine.close()


def build_standalone(config: RunConfig) -> Standalone:
    """Collective. The weights are those of the newest checkpoint in the run directory (unless checkpoint.resume is false), else of
    `model.path`. No optimizer is built, and no trainer where vLLM reads the weights itself."""
    from megatron_antisd.parallel.checkpoint_files import is_checkpoint
    from megatron_antisd.parallel.layout import start_process_group

    config = _with_newest_checkpoint(config)
    path = Path(config.model.path)
    inputs = read_inputs(config, training=False)
    start_process_group(config.parallel.timeout_seconds)
    evaluator = build_evaluator(config, inputs, _build_engine(config, inputs), config.directory / DIRECTORY, is_main=dist.get_rank() == 0)
    return Standalone(evaluator=evaluator, step=_step_of(path) if is_checkpoint(path) else 0, policy=f"{path} {_digest(path)}")


def _build_engine(config: RunConfig, inputs: Inputs) -> Engine:
    from megatron_antisd.parallel.checkpoint_files import is_checkpoint

    if config.rollout.engine == "vllm" and not is_checkpoint(config.model.path):
        return build_vllm_engine(config, inputs.max_context)
    engine, trainer = build_engine_and_trainer(config, inputs.max_context, training=False)
    problem = next(problem for problems in inputs.benchmarks.values() for problem in problems)
    synchronise(engine, trainer.export(), 0, build_probe(config, inputs, problem, trainer))
    return engine


def _with_newest_checkpoint(config: RunConfig) -> RunConfig:
    from megatron_antisd.parallel.checkpoint_files import latest_checkpoint

    newest = latest_checkpoint(config.directory / "checkpoints") if config.checkpoint.resume else None
    if newest is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(newest)})})


def _step_of(checkpoint: Path) -> int:
    """0 for a checkpoint that was converted and belongs to no step."""
    from megatron_antisd.parallel.checkpoint_files import WEIGHTS_ONLY, CheckpointError, read_manifest, step_of

    try:
        return 0 if read_manifest(checkpoint).get("kind") == WEIGHTS_ONLY else step_of(checkpoint)
    except (CheckpointError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error


def _digest(path: Path) -> str:
    """Of the weight files' names, sizes and times: reading 60 GB to name them would take longer than many an evaluation."""
    files = sorted([*path.glob("*.safetensors"), *path.glob("tensors/*"), *path.glob("manifest.json")])
    lines = [f"{file.relative_to(path)} {(stat := file.stat()).st_size} {stat.st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
