"""Ranks of the layout test: score, take steps, stream gradients and weights out; rank 0 writes what it got.

Usage: layout_ranks.py CHECKPOINT OUTPUT STEPS [key=value ...]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import RunConfig, build_config
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import ScoringView, TrainingBatch

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer

SMALL_BUCKET = 4 << 10  # bytes: a matrix fills a bucket of its own, norms share one

def configuration(checkpoint: str, overrides: list[str]) -> RunConfig:
    import yaml

    raw: dict = {
        "model": {"path": checkpoint, "dtype": "float32"}, "data": {"train": ["none"]},
        "optimizer": {"lr": 1e-3, "clip_grad": 1.0}, "trainer": {"micro_batch_tokens": 60, "score_micro_batch_tokens": 90, "vocab_chunk_bytes": 4096},
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


def gather_gradient_shards(trainer: Trainer) -> None:
    """Make the gradient buffers whole: for the distributed optimizer Megatron reduces only this rank's part of every bucket (`shard_buffer`),
    the rest is left as it was before the reduction."""
    from megatron.core.distributed.param_and_grad_buffer import shard_buffer

    for bucket_group in (g for chunk in trainer.ddp for g in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)):
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            mine = shard_buffer(bucket.grad_data, group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def gradients(trainer: Trainer, norm: float) -> dict[str, torch.Tensor]:
    """Hugging Face name -> gradient of the update just made, before clipping. Collective."""
    config = trainer.config
    if config.parallel.distributed_optimizer:
        gather_gradient_shards(trainer)
    unclip = max(1.0, (norm + 1e-6) / config.optimizer.clip_grad)  # clipping scaled the buffers in place
    return {name: tensor * unclip for name, tensor in trainer._stream.stream(lambda p: p.main_grad)}


def check_small_buckets(trainer: Trainer, streamed: dict[str, torch.Tensor]) -> None:
    """Where the buckets end must not show: names, order and values are those of the stream with the default size. Collective."""
    from megatron_antisd.models.weight_map import Layout
    from megatron_antisd.parallel.reshard import WeightStream

    small = WeightStream(trainer.chunks, trainer.description, trainer.layout, bucket_bytes=SMALL_BUCKET)

    def kinds(stream: WeightStream) -> list[tuple]:
        return [(bucket[0].stage, bucket[0].weight.expert, bucket[0].weight.layout is Layout.VOCAB,
                 trainer.layout.tensor_size > 1 and bucket[0].weight.layout is Layout.REPLICATED) for bucket in stream.buckets]

    default = kinds(trainer._stream)
    assert len(default) == len(set(default)), "the default size holds each kind of this model in one bucket"
    assert len(small.buckets) > 2 * len(default) and any(len(bucket) > 1 for bucket in small.buckets), "many buckets, some of several weights"
    assert all(len(bucket) == 1 or sum(e.numel for e in bucket) * 4 <= SMALL_BUCKET for bucket in small.buckets)
    for (name, tensor), (expected_name, expected) in zip(small.stream(), streamed.items(), strict=True):
        assert name == expected_name and torch.equal(tensor, expected), name


def check_no_graph_stays(trainer: Trainer) -> None:
    """What Megatron's dispatchers remember of the last row must not hold its graph, and with recomputation each layer's input, until the next."""
    dispatchers = [module.token_dispatcher for chunk in trainer.chunks for module in chunk.modules() if hasattr(module, "token_dispatcher")]
    assert not any(dispatcher.probs.requires_grad for dispatcher in dispatchers)


def main() -> None:
    checkpoint, output, steps, *overrides = sys.argv[1:]
    config = configuration(checkpoint, overrides)
    start_process_group(config.parallel.timeout_seconds)
    megatron_cpu.install()
    from megatron_antisd.models import build
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    if os.environ.get("WITHOUT_EXPERT_MARKS"):
        build._mark_expert_parameters = lambda model: None
    layout = build_layout(config.parallel, seed=0)
    trainer = Trainer(config, layout, describe(checkpoint, layout.tensor_size))
    views = make_views()
    result: dict = {"loaded": {name: tensor.clone() for name, tensor in trainer.export()}}
    check_small_buckets(trainer, result["loaded"])
    scores = trainer.score(views, gather_entropy=True)
    assert scores.entropy_median == float(scores.entropy.median()), "selected and gathered medians differ"
    result["score"] = (scores.log_prob, scores.entropy)
    result["steps"], result["student"] = [], []
    for step in range(int(steps)):
        # Fewer views in the second step, so another number of micro-batches: Megatron counts how often a gradient is ready only once.
        stats = trainer.step(make_batch(views[:5] if step == 1 else views, step), learning_rate=1e-3)
        if step == 0:
            result["gradients"] = gradients(trainer, stats.grad_norm)
        result["steps"].append((stats.loss, stats.grad_norm, stats.clip_fraction, stats.student_entropy_mean, stats.mismatch_kl))
        result["student"].append(stats.student.log_prob)
        result["padding"] = stats.padding_share
    check_no_graph_stays(trainer)
    result["weights"] = {name: tensor.clone() for name, tensor in trainer.export()}
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result["steps"], result["score"][0].tolist(), float(sum(t.double().sum() for t in result["weights"].values()))))
    assert all(other == everyone[0] for other in everyone) or os.environ.get("WITHOUT_EXPERT_MARKS"), "ranks disagree"
    if dist.get_rank() == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
