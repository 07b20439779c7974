"""Ranks of the layout test: score, take steps, stream the weights out; rank 0 writes what it got.

Usage: layout_ranks.py CHECKPOINT OUTPUT STEPS [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import RunConfig, build_config
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import ScoringView, TrainingBatch


def configuration(checkpoint: str, overrides: list[str]) -> RunConfig:
    import yaml

    raw: dict = {
        "model": {"path": checkpoint, "dtype": "float32"}, "data": {"train": ["none"]},
        "optimizer": {"lr": 1e-3, "clip_grad": 1.0}, "trainer": {"micro_batch_tokens": 60, "score_micro_batch_tokens": 90, "vocab_chunk_tokens": 16},
        "parallel": {"timeout_seconds": 60},
    }
    for text in overrides:
        key, value = text.split("=")
        section, leaf = key.split(".")
        raw.setdefault(section, {})[leaf] = yaml.safe_load(value)
    return build_config(raw)


def make_batch(views: tuple[ScoringView, ...], step: int) -> TrainingBatch:
    """AntiSD's terms all at work: advantages of both signs, a masked teacher, an old policy, a dropped sequence."""
    generator = torch.Generator().manual_seed(100 + step)
    lengths = [len(v.response_ids) for v in views]
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) > 0.2
    keep = torch.ones(len(views), dtype=torch.bool)
    keep[1] = False
    engine = -4 + 0.1 * torch.randn(total, generator=generator)
    return TrainingBatch(
        views=views, sequence_advantage=torch.randn(len(views), generator=generator), sequence_mask=keep,
        teacher_log_prob=-4 + torch.randn(total, generator=generator), teacher_mask=mask,
        old_log_prob=engine if step else None, engine_log_prob=engine, lambda_=0.5,
        tokens=sum(n for n, kept in zip(lengths, keep.tolist(), strict=True) if kept))


def main() -> None:
    checkpoint, output, steps, *overrides = sys.argv[1:]
    config = configuration(checkpoint, overrides)
    start_process_group(config.parallel.timeout_seconds)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=0)
    trainer = Trainer(config, layout, describe(checkpoint, layout.tensor_size))
    views = make_views()
    result: dict = {"loaded": {name: tensor.clone() for name, tensor in trainer.export()}}
    scores = trainer.score(views)
    result["score"] = (scores.log_prob, scores.entropy)
    result["steps"], result["student"] = [], []
    for step in range(int(steps)):
        stats = trainer.step(make_batch(views, step), learning_rate=1e-3)
        if step == 0 and not config.parallel.distributed_optimizer:
            # Clipping scaled the gradient buffers in place: undo it.
            unclip = max(1.0, (stats.grad_norm + 1e-6) / config.optimizer.clip_grad)
            result["gradients"] = {n: t * unclip for n, t in trainer._stream.stream(lambda p: p.main_grad)}
        result["steps"].append((stats.loss, stats.grad_norm, stats.clip_fraction, stats.student_entropy_mean, stats.mismatch_kl))
        result["student"].append(stats.student.log_prob)
        result["padding"] = stats.padding_share
    result["weights"] = {name: tensor.clone() for name, tensor in trainer.export()}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result["steps"], result["score"][0].tolist(), float(sum(t.double().sum() for t in result["weights"].values()))))
    assert all(other == everyone[0] for other in everyone), "ranks disagree"
    if dist.get_rank() == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
