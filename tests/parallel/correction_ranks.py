"""Ranks of the correction's test: one update for each case, from one checkpoint; rank 0 writes what it got.

Usage: correction_ranks.py CHECKPOINT OUTPUT [key=value ...]
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, gradients, make_batch
from tiny import make_views

from megatron_antisd.algorithm import sequence_log_ratio
from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import TrainingBatch

SPREAD = 0.6
"""Of the engine's log-probs around the trainer's: about a quarter of the weights lie outside of the bounds 0.5 and 2."""

CASES = {
    "off": ["correction.mode=off"],
    "auto": [],
    "truncate": ["correction.mode=truncate"],
    "mask": ["correction.mode=mask"],
    "truncate-sequence": ["correction.mode=truncate", "correction.level=sequence"],
    "mask-sequence": ["correction.mode=mask", "correction.level=sequence"],
    "truncate-old": ["correction.mode=truncate"],
}


def case_batch(name: str, log_prob: torch.Tensor) -> TrainingBatch:
    """`log_prob` [T] under the weights that train: an engine scattered around it and, off-policy, an old policy around that."""
    batch = make_batch(make_views(), 0)
    generator = torch.Generator().manual_seed(11)
    noise = torch.randn(2, len(log_prob), generator=generator)
    engine = log_prob + SPREAD * noise[0] / (4 if name.endswith("sequence") else 1)
    old = log_prob + 0.1 * noise[1] if name.endswith("old") else None
    ratio = sequence_log_ratio(log_prob - engine, batch.lengths) if name.endswith("sequence") else None
    return dataclasses.replace(batch, engine_log_prob=engine, old_log_prob=old, correction_log_ratio=ratio)


def main() -> None:
    checkpoint, output, *overrides = sys.argv[1:]
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout, result = build_layout(configuration(checkpoint, overrides).parallel, seed=0), {}
    log_prob = torch.load(Path(checkpoint) / "log_prob.pt")
    for name, settings in CASES.items():
        trainer = Trainer(configuration(checkpoint, [*overrides, *settings]), layout, describe(checkpoint, layout.tensor_size))
        stats = trainer.step(case_batch(name, log_prob), learning_rate=1e-3)
        figures = {key: value for key, value in vars(stats).items() if isinstance(value, float | None) and key != "padding_share"}
        result[name] = (figures, gradients(trainer, stats.grad_norm))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [figures for figures, _ in result.values()])
    assert all(other == everyone[0] for other in everyone), "ranks disagree"
    if dist.get_rank() == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
