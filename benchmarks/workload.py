"""What is measured: two shapes, and the inputs of a run at each (checkpoint with random weights, problems, configuration).

Weights are random and responses have a fixed length (`rollout.ignore_eos`), so every step of every run does the same amount of work. The
problems carry a solution as long as a response: the teacher's prompts are then as long as with a peer's solution.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from examples.tiny_checkpoint import Shape, make_tiny_checkpoint

PROMPT_WORDS = 11
PROBLEMS = 64


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape: `problems` x `rollouts` responses of `new_tokens` tokens a step."""

    name: str
    model: Shape
    vocab_size: int
    problems: int
    rollouts: int
    new_tokens: int
    warm_up: int
    """Steps a run makes before those that count."""
    steps: int
    """Steps of a run that count."""

    @property
    def sequences(self) -> int:
        return self.problems * self.rollouts


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="quickstart", model=Shape(hidden=128, head_dim=32, experts=4, intermediate=128, context=256), vocab_size=96,
                 problems=8, rollouts=8, new_tokens=64, warm_up=3, steps=15),
        Workload(name="bench", model=Shape(hidden=256, head_dim=64, experts=8, intermediate=256, context=512), vocab_size=512,
                 problems=16, rollouts=8, new_tokens=128, warm_up=2, steps=8),
    )
}


def coin(response: str, answer: str) -> float:
    """Reward of a random response: 1.0 for half of all texts. Random weights solve nothing, and equal rewards would make every advantage 0."""
    return float(zlib.crc32(f"{answer} {response}".encode()) & 1)


def make_inputs(workload: Workload, directory: Path) -> None:
    """`checkpoint/` and `problems.jsonl` in `directory`; what is there already is kept."""
    if not (directory / "checkpoint/model.safetensors").is_file():
        make_tiny_checkpoint(directory / "checkpoint", shape=workload.model, vocab_size=workload.vocab_size)
    rng = random.Random(0)
    words = [f"w{i}" for i in range(10, 80)]
    with (directory / "problems.jsonl").open("w") as file:
        for index in range(PROBLEMS):
            row = {"id": f"p{index}", "problem": " ".join(rng.choices(words, k=PROMPT_WORDS)), "answer": str(index),
                   "solution": " ".join(rng.choices(words, k=workload.new_tokens))}
            file.write(json.dumps(row) + "\n")


def write_config(workload: Workload, directory: Path, name: str, method: str, *, model_parallel_size: int = 2, steps: int | None = None) -> Path:
    """The configuration of one run in `directory/name`. `model_parallel_size` 2 is the quickstart's layout: TP2 with sequence parallelism, EP2,
    ETP1; 1 leaves data parallelism alone."""
    config: dict[str, Any] = {
        "run": {"name": name, "directory": str(directory / name), "steps": workload.warm_up + (steps or workload.steps)},
        "model": {"path": str(directory / "checkpoint"), "dtype": "float32"},
        "data": {"train": [str(directory / "problems.jsonl")]},
        "parallel": {"tensor_parallel_size": model_parallel_size, "expert_parallel_size": model_parallel_size, "expert_tensor_parallel_size": 1,
                     "timeout_seconds": 300},
        "algorithm": {"method": method},
        # One warm-up step, then lambda > 0 for good: the steps that count pay for the whole method.
        "gate": {"mode": "always", "warmup_steps": 1},
        "privileged": {"template": "{problem} w1 {solution} w2 {feedback} w3", "correct": "w4", "incorrect": "w5"},
        "rollout": {"problems_per_step": workload.problems, "group_size": workload.rollouts, "max_new_tokens": workload.new_tokens,
                    "max_sequences": workload.sequences, "kv_cache_bytes": 128 << 20, "ignore_eos": True},
        "trainer": {"micro_batch_tokens": 8192, "score_micro_batch_tokens": 8192},
        "optimizer": {"lr": 1e-6},
        "grading": {"workers": 1, "function": "benchmarks.workload:coin"},
        "checkpoint": {"save_hf": False, "resume": False},
        "logging": {"progress": False},
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path
