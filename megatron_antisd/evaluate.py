"""Evaluation: samples of a benchmark's problems -> `eval/<benchmark>/...` metrics, fractions from 0 to 1.

    torchrun --nproc-per-node N -m megatron_antisd.evaluate CONFIG.yaml [key=value ...]

Any checkpoint: `model.path` is a Hugging Face checkpoint or one of a training run; a run directory with checkpoints is evaluated at its
newest. Results go to `evaluation/` in the run directory, each step's beside the others'; called again after an interruption, it goes on where
the samples end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_antisd.config import ConfigError, dump_config, load_config
from megatron_antisd.evaluation.evaluator import agreed
from megatron_antisd.evaluation.standalone import build_standalone
from megatron_antisd.evaluation.statistics import pass_at_k
from megatron_antisd.evaluation.store import StoreError, weights_name
from megatron_antisd.keeping import pause
from megatron_antisd.metrics import MetricsWriter
from megatron_antisd.metrics.files import CONFIG
from megatron_antisd.run import SETUP_ERRORS, Run, set_up_logging, start_supervisor
from megatron_antisd.supervision import preemption
from megatron_antisd.supervision.preemption import Preempted, leave_preempted

__all__ = ["evaluate", "is_due", "is_pending", "main", "pass_at_k"]


def is_due(run: Run, step: int) -> bool:
    return bool(run.evaluator.benchmarks) and (step % run.config.evaluation.every == 0 or step == run.config.run.steps)


def is_pending(run: Run, metrics: MetricsWriter, step: int) -> bool:
    """Whether the evaluation of a step that is done is still to be made; the same on every rank."""
    return is_due(run, step) and agreed(not metrics.has_evaluation(step))


def evaluate(run: Run, metrics: MetricsWriter, step: int) -> None:
    """Evaluate a training run's present policy, the one after `step` updates. Collective. Raises Preempted between two parts when the run is
    asked to stop: the next start goes on with the part that comes then."""
    updates = run.progress.policy_version
    # Samples of step 0 outlive a run that is begun anew: they are named by what the weights are.
    policy = f"{run.config.run.name}, {updates} updates" if step else weights_name(run.origin or Path(run.config.model.path))
    with run.supervisor.stage("evaluate", step):
        run.evaluator.evaluate(metrics, step, policy, pause=lambda: pause(run))


def main(arguments: Sequence[str]) -> None:
    """One row in `evaluation/metrics.jsonl` of the run directory, every sample in `evaluation/evaluations/`."""
    if not arguments:
        sys.exit("usage: torchrun --nproc-per-node N -m megatron_antisd.evaluate CONFIG.yaml [key=value ...]")
    set_up_logging()
    try:
        config = load_config(arguments[0], arguments[1:])
        if not config.evaluation.benchmarks:
            raise ConfigError("evaluation.benchmarks is empty: there is nothing to evaluate; list at least one, e.g. [{name: aime2024}]")
        alone = build_standalone(config)
    except SETUP_ERRORS as error:
        sys.exit(f"configuration error: {error}")
    supervisor = start_supervisor(config)
    with supervisor, MetricsWriter(alone.evaluator.directory, config=config.logging, total_steps=max(config.run.steps, alone.step), resume_step=None,
                                   run_name=config.run.name, is_writer=alone.evaluator.is_main, evaluation_alone=True) as metrics:
        if alone.evaluator.is_main:
            (alone.evaluator.directory / CONFIG).write_text(dump_config(config))
        try:
            with supervisor.stage("evaluate", alone.step):
                alone.evaluator.evaluate(metrics, alone.step, alone.policy, pause=_stop_if_asked)
        except StoreError as error:
            sys.exit(f"error: {error}")
        except Preempted:
            supervisor.close()
            leave_preempted(alone.evaluator.directory, alone.step, None)
    alone.close()
    dist.barrier()
    dist.destroy_process_group()


def _stop_if_asked() -> None:
    if preemption.agreed():
        raise Preempted("asked to stop; the same command goes on behind the samples that are stored")


if __name__ == "__main__":
    main(sys.argv[1:])
