"""How evenly a batch of long-tailed responses spreads over data-parallel ranks: `python -m benchmarks.packing`.

Lengths like those of a reasoning model: groups of 8, log-normal responses cut at 32,768 tokens (3 to 4 % of them are), prompts of 100 to 300. The
teacher's prompts hold the shortest response of the group (that one is shown the second shortest) and end in one of two assessments. Ranks are
simulated: costs are FLOPs by the model's sizes, and only planning is timed. The least possible is the mean or, where that is more, the costliest
sequence. "Waiting in every micro-batch" is the costliest micro-batch of each number over all ranks, summed: an upper bound for expert-parallel
groups, which are smaller. Three ways to make micro-batches of the same token limit:

* `ours`: `megatron_antisd.data.packing`, shared prompts computed once.
* `first-fit`: each sequence into the first micro-batch with room, those dealt out to the ranks in turn.
* `padded`: equal numbers of sequences a rank, as many at once as fit when padded to the longest, the way of trainers without packing.

Goals, for ours: at least 99 % of the model's tokens real; with 32 rollouts a rank the slowest rank at most 5 % over the mean.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.launch import machine
from megatron_antisd.compat import megatron_cpu
from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.data.packing import CostModel, input_length, plan_bundles
from megatron_antisd.records import ScoringView

REAL, OVER_MEAN = 0.99, 1.05
MULTIPLE = 16  # what a row's length must divide by: TP 8 with context parallelism, the largest of any layout here
SIZES = ((8, 256), (64, 2048), (512, 16384), (64, 256))  # ranks, rollouts; 256 are the paper's batch
LIMITS = {"student": 32768, "teacher": 65536}
GROUP, LONGEST, MEDIAN = 8, 32768, 6000
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
                          num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                          vocab_size=151936),
    "Qwen3-8B": dict(model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, vocab_size=151936),
    "OLMo-3-7B": dict(model_type="olmo3", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=32, sliding_window=4096, vocab_size=100278),
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a way of making micro-batches comes to."""

    costs: list[list[int]]
    """FLOPs of each rank's micro-batches."""
    real: int
    """Tokens of sequences."""
    tokens: int
    """Tokens through the model."""

    @property
    def mean(self) -> float:
        return sum(map(sum, self.costs)) / len(self.costs)

    @property
    def slowest(self) -> int:
        return max(map(sum, self.costs))

    @property
    def waiting(self) -> int:
        """Where ranks wait for each other in every micro-batch: the costliest of each number, added up."""
        most = max(map(len, self.costs))
        return sum(max(rank[number] for rank in self.costs if number < len(rank)) for number in range(most))


def batches(rollouts: int) -> dict[str, list[ScoringView]]:
    """Student's and teacher's views. Ranges stand in for response ids, of which planning reads the number alone; a group's teacher prompts
    are four objects, as the prompt builder makes them, of ids of their own."""
    generator, ids = random.Random(rollouts), np.random.default_rng(rollouts)
    views: dict[str, list[ScoringView]] = {"student": [], "teacher": []}
    for _ in range(rollouts // GROUP):
        # A hard problem makes all its responses longer.
        problem = MEDIAN * math.exp(generator.gauss(0, 0.55))
        responses = [range(min(LONGEST, 16 + int(problem * math.exp(generator.gauss(0, 0.75))))) for _ in range(GROUP)]
        prompt = ids.integers(1000, 150_000, generator.randint(100, 300)).tolist()
        shortest, second = sorted(range(GROUP), key=lambda i: len(responses[i]))[:2]
        shown = {i: ids.integers(1000, 150_000, len(responses[i])) for i in (shortest, second)}
        assessments = [ids.integers(1000, 150_000, 40) for _ in range(2)]
        teachers = {(i, a): (*prompt, *shown[i].tolist(), *assessments[a].tolist()) for i in shown for a in range(2)}
        for i, response in enumerate(responses):
            views["student"].append(ScoringView(prompt_ids=tuple(prompt), response_ids=response))
            prompt_ids = teachers[second if i == shortest else shortest, generator.randrange(2)]
            views["teacher"].append(ScoringView(prompt_ids=prompt_ids, response_ids=response))
    return views


def ours(views: Sequence[ScoringView], ranks: int, limit: int, model: CostModel) -> Spread:
    bundles, plan = plan_bundles(views, ranks, limit, model)
    tokens, costs = [bundle.tokens(views) for bundle in bundles], [bundle.cost(views, model) for bundle in bundles]
    return _packed(plan, tokens, costs)


def first_fit(views: Sequence[ScoringView], ranks: int, limit: int, model: CostModel) -> Spread:
    room, members = np.full(len(views), limit), [[] for _ in views]
    tokens = [input_length(view) for view in views]
    for index, length in enumerate(tokens):
        first = int(np.argmax((room >= length) | (room == limit)))  # an empty one takes any
        room[first] -= length
        members[first].append(index)
    filled = [row for row in members if row]
    return _packed([filled[rank::ranks] for rank in range(ranks)], tokens, [model.view(view) for view in views])


def _packed(plan: Sequence[Sequence[Sequence[int]]], tokens: Sequence[int], costs: Sequence[int]) -> Spread:
    rows = [sum(tokens[i] for i in row) for rank in plan for row in rank]
    return Spread(costs=[[sum(costs[i] for i in row) for row in rank] for rank in plan], real=sum(rows),
                  tokens=sum(length + -length % MULTIPLE for length in rows))


def padded(views: Sequence[ScoringView], ranks: int, limit: int, model: CostModel) -> Spread:
    share, costs, tokens = len(views) // ranks, [], 0
    for rank in range(ranks):
        rows: list[list[ScoringView]] = []
        for view in views[rank * share : (rank + 1) * share]:
            if rows and (len(rows[-1]) + 1) * max(map(input_length, [*rows[-1], view])) <= limit:
                rows[-1].append(view)
            else:
                rows.append([view])
        costs.append([len(row) * (model.beginning(max(map(input_length, row))) + model.scored * max(len(view.response_ids) for view in row))
                      for row in rows])
        tokens += sum(len(row) * max(map(input_length, row)) for row in rows)
    return Spread(costs=costs, real=sum(map(input_length, views)), tokens=tokens)


def model_of(name: str) -> CostModel:
    """Of a model by its config.json alone."""
    quiet_libraries()
    megatron_cpu.install()
    from megatron_antisd.models.description import describe
    from megatron_antisd.parallel.rows import cost_model

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        return cost_model(describe(folder, 1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Qwen3-30B-A3B", help="whose sizes (default: the one with the most attention a token)")
    model = model_of(parser.parse_args(arguments).model)
    print(f"{machine()}\n")
    print("| pass | ranks | rollouts | way | real tokens | slowest rank / mean | least possible | waiting in every micro-batch / mean "
          "| compute / ours | planning, processor s |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    missed = False
    ways: dict[str, Callable[..., Spread]] = {"ours": ours, "first-fit": first_fit, "padded": padded}
    for ranks, rollouts in SIZES:
        for kind, views in batches(rollouts).items():
            mine = None
            for name, way in ways.items():
                start = time.process_time()
                spread = way(views, ranks, LIMITS[kind], model)
                seconds = time.process_time() - start
                mine = mine or spread
                over, real = spread.slowest / spread.mean, spread.real / spread.tokens
                least = max(1.0, max(map(model.view, views)) / spread.mean)
                missed |= name == "ours" and (real < REAL or (rollouts == 32 * ranks and over > OVER_MEAN))
                print(f"| {kind} | {ranks} | {rollouts} | {name} | {real:.2%} | {over:.3f} | {least:.3f} | {spread.waiting / spread.mean:.3f} "
                      f"| {spread.mean / mine.mean:.2f} | {seconds:.2f} |", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
