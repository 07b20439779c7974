"""One GRPO run with TRL on the benchmark's inputs; started by `benchmarks.against_trl`. Writes the seconds of every step as JSON.

The settings are those that make TRL fast here and the work the same as ours: no gradient checkpointing, no reference model, no
auxiliary router loss, cached generation of a fixed length in float32. Whatever else is TRL's default stays.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.workload import WORKLOADS, Workload, coin


class Stopwatch(TrainerCallback):
    """Seconds between the ends of steps: generation, scoring, update and the trainer's own bookkeeping."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The same coin as in our runs."""
    return [coin(completion[0]["content"], gold) for completion, gold in zip(completions, answer, strict=True)]


def settings(workload: Workload, output: Path, steps: int, micro_batch: int) -> GRPOConfig:
    """The same batch, length, learning rate and loss as our runs."""
    return GRPOConfig(
        output_dir=str(output), max_steps=steps, use_cpu=True, bf16=False, seed=0, learning_rate=1e-6, lr_scheduler_type="constant",
        per_device_train_batch_size=micro_batch, gradient_accumulation_steps=workload.sequences // micro_batch,
        num_generations=workload.rollouts, max_completion_length=workload.new_tokens, generation_kwargs={"min_new_tokens": workload.new_tokens},
        temperature=1.0, beta=0.0, router_aux_loss_coef=0.0, loss_type="dapo", scale_rewards="group", num_iterations=1, gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, weight_decay=0.01, max_grad_norm=1.0,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True)


def main() -> None:
    """Train a few steps and write the time of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(WORKLOADS), required=True)
    parser.add_argument("--directory", type=Path, required=True, help="holds checkpoint/ and problems.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences of a forward and backward pass")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    workload = WORKLOADS[given.shape]
    rows = [json.loads(line) for line in (given.directory / "problems.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": row["problem"]}], "answer": row["answer"]} for row in rows])
    stopwatch = Stopwatch()
    trainer = GRPOTrainer(
        model=str(given.directory / "checkpoint"), reward_funcs=reward, train_dataset=data, callbacks=[stopwatch],
        args=settings(workload, given.directory / "trl", given.steps, given.micro_batch))
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    given.output.write_text(json.dumps({"seconds": stopwatch.seconds, "response_length_mean": lengths}))


if __name__ == "__main__":
    main()
