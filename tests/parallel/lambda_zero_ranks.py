"""Two steps from one checkpoint for every method; writes the weights each arrives at. Usage: lambda_zero_ranks.py CHECKPOINT OUTPUT"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, make_batch
from tiny import make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group

# name -> (overrides, lambda, what the teacher's log-probs are replaced by)
RUNS: dict[str, tuple[list[str], float, float | None]] = {
    "grpo": (["algorithm.method=grpo"], 0.0, None),
    "grpo-again": (["algorithm.method=grpo"], 0.0, None),
    "grpo-with-lambda": (["algorithm.method=grpo"], 0.5, None),
    "shadow": (["algorithm.method=grpo", "algorithm.shadow=true"], 0.0, None),
    "antisd": (["algorithm.method=antisd"], 0.0, None),
    "antisd-without-teacher": (["algorithm.method=antisd"], 0.0, float("nan")),
    "multiplicative": (["algorithm.method=antisd", "algorithm.compose=multiplicative"], 0.0, None),
    "sd": (["algorithm.method=sd"], 0.0, None),
    "reverse_kl": (["algorithm.method=reverse_kl"], 0.0, float("-inf")),
    "no_teacher": (["algorithm.method=no_teacher"], 0.0, None),
    "antisd-at-work": (["algorithm.method=antisd"], 0.5, None),
}


def main() -> None:
    checkpoint, output = sys.argv[1:]
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(configuration(checkpoint, []).parallel, seed=0)
    views, result = make_views(), {}
    for name, (overrides, lambda_, teacher) in RUNS.items():
        trainer = Trainer(configuration(checkpoint, overrides), layout, describe(checkpoint, layout.tensor_size))
        steps = []
        for step in range(2):
            batch = dataclasses.replace(make_batch(views, step), lambda_=lambda_)
            if teacher is not None:
                batch = dataclasses.replace(batch, teacher_log_prob=torch.full_like(batch.teacher_log_prob, teacher))
            stats = trainer.step(batch, learning_rate=1e-3)
            steps.append((stats.loss, stats.grad_norm, stats.skipped))
        result[name] = (steps, {key: tensor.clone() for key, tensor in trainer.export()})
    trainer = Trainer(configuration(checkpoint, ["optimizer.weight_decay=0.5"]), layout, describe(checkpoint, layout.tensor_size))
    before = {key: tensor.clone() for key, tensor in trainer.export()}
    batch = make_batch(views, 0)
    trainer.step(dataclasses.replace(batch, sequence_advantage=torch.zeros_like(batch.sequence_advantage), lambda_=0.0), learning_rate=1e-2)
    result["decay"] = (before, {key: tensor.clone() for key, tensor in trainer.export()})
    torch.save(result, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
