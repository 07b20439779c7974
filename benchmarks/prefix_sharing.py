"""What does the teacher's pass save by computing each privileged prompt of a group once? `python -m benchmarks.prefix_sharing`.

A real `Trainer.score` of a 7.4M-parameter Qwen3-MoE on one rank of one thread. A group's G views have two prompts that end in a short
feedback (one rollout is shown another solution than the rest, as where several are correct), and responses of 256 tokens. The unshared pass is
the same call on views of the same lengths whose prompts differ from their first token on. Both by turns in one process; products and attention
are counted by torch as they run. Exactness: every view scored in a batch of its own.

Goal: at least 0.8 of the tokens saved show as time saved, log-probs and entropies within 1e-4 nats.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.launch import machine

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer
    from megatron_antisd.records import ScoringView

RESPONSE, FEEDBACK, GROUPS, GROUP_SIZE = 256, 6, 4, 8
RATIOS = (0.25, 1.0, 4.0)
VOCABULARY = 512
EXACT, SHOWN = 1e-4, 0.8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The teacher's pass over one batch, shared against unshared."""

    tokens: tuple[int, int]
    """Through the model."""
    flops: tuple[int, int]
    seconds: tuple[float, float]
    difference: float
    """Largest, nats, of a view in its group and alone."""

    def ratio(self, name: str) -> float:
        shared, unshared = getattr(self, name)
        return shared / unshared


def build_trainer(directory: Path) -> Trainer:
    """On this process alone."""
    from examples.tiny_checkpoint import Shape, make_tiny_checkpoint
    from megatron_antisd.compat import megatron_cpu
    from megatron_antisd.config import build_config
    from megatron_antisd.parallel.layout import build_layout, start_process_group

    checkpoint = directory / "checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        make_tiny_checkpoint(checkpoint, shape=Shape(context=2048), vocab_size=VOCABULARY)
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    config = build_config({
        "model": {"path": str(checkpoint), "dtype": "float32"}, "data": {"train": ["none"]},
        "trainer": {"score_micro_batch_tokens": 12_288}, "parallel": {"distributed_optimizer": False}})
    layout = build_layout(config.parallel, seed=0)
    return Trainer(config, layout, describe(checkpoint, layout.tensor_size))


def make_views(ratio: float, group_size: int, shared: bool) -> list[ScoringView]:
    """Groups of views with trunks of `ratio` responses; the second trunk is one rollout's. Not `shared`: every first token is another."""
    import torch

    from megatron_antisd.records import ScoringView

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, VOCABULARY, (count,), generator=generator).tolist())

    views: list[ScoringView] = []
    for _ in range(GROUPS):
        trunks, feedback = [ids(int(ratio * RESPONSE)) for _ in range(2)], [ids(FEEDBACK) for _ in range(2)]
        for index in range(group_size):
            prompt = (*trunks[index == 0], *feedback[index % 2])
            first = prompt[:1] if shared else (8 + len(views),)
            views.append(ScoringView(prompt_ids=(*first, *prompt[1:]), response_ids=ids(RESPONSE)))
    return views


def compare(trainer: Trainer, ratio: float, group_size: int, rounds: int) -> Comparison:
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from megatron_antisd.models import attention
    from megatron_antisd.parallel.rows import cost_model, plan_rows

    batches = [make_views(ratio, group_size, shared) for shared in (True, False)]
    # The bias that says "the last query beside the last key" cannot be made while torch counts; a plain mask costs the same here.
    plain = mock.patch.object(attention, "causal_lower_right", lambda queries, keys: torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries))
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    flops, tokens, seconds = [], [], ([], [])
    for views in batches:
        with plain, FlopCounterMode(display=False, custom_mapping=kernels) as counted:
            trainer.score(views)
        flops.append(counted.get_total_flops())
        rows = plan_rows(views, trainer.layout, trainer.config.trainer.score_micro_batch_tokens, model=cost_model(trainer.description)).rows
        tokens.append(sum(len(row.input_ids) for row in rows))
        if views is batches[0]:
            scores = trainer.score(views, gather_entropy=True)
            alone = [trainer.score([view], gather_entropy=True) for view in views]
            apart = [torch.cat([getattr(one, name) for one in alone]) - getattr(scores, name) for name in ("log_prob", "entropy")]
            difference = float(torch.stack(apart).abs().max())
    for _ in range(rounds):
        for views, found in zip(batches, seconds, strict=True):
            start = time.perf_counter()
            trainer.score(views)
            found.append(time.perf_counter() - start)
    return Comparison(tokens=tuple(tokens), flops=tuple(flops), difference=difference,
                      seconds=(statistics.median(seconds[0]), statistics.median(seconds[1])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/prefix_sharing"))
    given = parser.parse_args(arguments)
    import torch

    from megatron_antisd.compat.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    trainer = build_trainer(given.output)
    print(f"{machine()}; {GROUPS} groups of {GROUP_SIZE}, responses of {RESPONSE} tokens\n")
    print("| prompt / response | tokens, unshared | shared | ratio | GFLOP, unshared | shared | ratio | seconds, unshared | shared | ratio | "
          "largest difference |")
    print("|---:" * 11 + "|", flush=True)
    missed = False
    for ratio in RATIOS:
        found = compare(trainer, ratio, GROUP_SIZE, given.rounds)
        cells: list[Any] = [f"{ratio:g}"]
        for name, unit, form in (("tokens", 1, ",.0f"), ("flops", 1e9, ",.0f"), ("seconds", 1, ".2f")):
            shared, unshared = getattr(found, name)
            cells += [format(unshared / unit, form), format(shared / unit, form), f"{found.ratio(name):.2f}"]
        print(f"| {' | '.join(cells)} | {found.difference:.1e} |", flush=True)
        missed |= found.difference > EXACT or 1 - found.ratio("seconds") < SHOWN * (1 - found.ratio("tokens"))
    return int(missed)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
