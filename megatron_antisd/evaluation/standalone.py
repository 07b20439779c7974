"""An evaluation without a training run around it: any checkpoint, any engine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_antisd.config import ConfigError, RunConfig, load_config
from megatron_antisd.evaluation.evaluator import Evaluator, build_evaluator
from megatron_antisd.evaluation.store import weights_name
from megatron_antisd.inputs import Inputs, read_inputs
from megatron_antisd.metrics.files import CONFIG
from megatron_antisd.policy import build_policy, build_vllm_engine
from megatron_antisd.rollout.engine import Engine
from megatron_antisd.rollout.probe import synchronise

DIRECTORY = "evaluation"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Standalone:
    evaluator: Evaluator
    step: int
    """Of the training checkpoint; 0 for Hugging Face weights."""
    policy: str
    """Names the weights: see `weights_name`."""

    def close(self) -> None:
        self.evaluator.grader.close()
        self.evaluator.engine.close()


def build_standalone(config: RunConfig) -> Standalone:
    """Collective. The weights are those of `model.path`; where that is what the run in `run.directory` was trained from, those of its newest
    checkpoint (unless checkpoint.resume is false). No optimizer is built, and no trainer where vLLM reads the weights itself."""
    from megatron_antisd.parallel.layout import start_process_group

    config = _with_newest_checkpoint(config)
    path = Path(config.model.path)
    step = _step_of(path)
    inputs = read_inputs(config, training=False)
    start_process_group(config.collective_seconds)
    main = dist.get_rank() == 0
    if main:
        _log.info("evaluating %s, step %d", path, step)
    evaluator = build_evaluator(config, inputs, _build_engine(config, inputs), config.directory / DIRECTORY, is_main=main)
    return Standalone(evaluator=evaluator, step=step, policy=weights_name(path))


def _build_engine(config: RunConfig, inputs: Inputs) -> Engine:
    from megatron_antisd.parallel.checkpoint_files import is_checkpoint

    if config.rollout.engine == "vllm" and not is_checkpoint(config.model.path):
        return build_vllm_engine(config, inputs.max_context)
    problem = next(problem for problems in inputs.benchmarks.values() for problem in problems)
    engine, trainer, probe = build_policy(config, inputs, problem, training=False)
    synchronise(engine, trainer.engine_weights, 0, probe)
    return engine


def _with_newest_checkpoint(config: RunConfig) -> RunConfig:
    from megatron_antisd.parallel.checkpoint_files import checkpoints, latest_checkpoint

    of_run, folder = config.directory / CONFIG, config.directory / "checkpoints"
    if not config.checkpoint.resume or not of_run.is_file() or load_config(of_run).model.path != config.model.path or not checkpoints(folder):
        return config
    newest = latest_checkpoint(folder)
    if newest is None:
        raise ConfigError(f"{folder} holds checkpoints, none of them whole (the log says why); name other weights with model.path, or set "
                          f"checkpoint.resume=false for those of {config.model.path}")
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(newest)})})


def _step_of(path: Path) -> int:
    """0 for weights that belong to no step of a run."""
    state = path / "state.json"
    return int(json.loads(state.read_text())["progress"]["step"]) if state.is_file() else 0
