"""The benchmarks that have a name here: what they are, where they are published, how many samples a problem the paper draws.

The names of data sets are those on Hugging Face. `tools/prepare_data.py NAME` fetches one and writes `data/<name>.jsonl`, where a
configuration that names the benchmark looks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

DIRECTORY = "data"


@dataclass(frozen=True, kw_only=True)
class RegisteredBenchmark:
    dataset: str
    """On Hugging Face."""
    split: str
    subset: str | None = None
    """The data set's configuration, where it has several."""
    samples: int
    """k of avg@k: arXiv 2605.11609, section on evaluation, for its seven; 1 or 4 for others."""
    problems: int
    """How many the published file holds; another number is reported by the preparation."""
    paper: bool = True
    """Whether it is one of the paper's seven."""


BENCHMARKS: dict[str, RegisteredBenchmark] = {
    "aime2024": RegisteredBenchmark(dataset="HuggingFaceH4/aime_2024", split="train", samples=32, problems=30),
    "aime2025": RegisteredBenchmark(dataset="MathArena/aime_2025", split="train", samples=32, problems=30),
    "aime2026": RegisteredBenchmark(dataset="MathArena/aime_2026", split="train", samples=32, problems=30),
    "hmmt_feb2025": RegisteredBenchmark(dataset="MathArena/hmmt_feb_2025", split="train", samples=32, problems=30),
    "minerva_math": RegisteredBenchmark(dataset="math-ai/minervamath", split="test", samples=4, problems=272),
    "humaneval_plus": RegisteredBenchmark(dataset="evalplus/humanevalplus", split="test", samples=10, problems=164),
    "mbpp_plus": RegisteredBenchmark(dataset="evalplus/mbppplus", split="test", samples=10, problems=378),
    "math500": RegisteredBenchmark(dataset="HuggingFaceH4/MATH-500", split="test", samples=4, problems=500, paper=False),
    "gsm8k": RegisteredBenchmark(dataset="openai/gsm8k", split="test", subset="main", samples=1, problems=1319, paper=False),
}
TRAINING_SETS: dict[str, RegisteredBenchmark] = {
    "dapo_math_17k": RegisteredBenchmark(dataset="BytedTsinghua-SIA/DAPO-Math-17k", split="train", samples=1, problems=17_917, paper=False),
}
PAPER = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.paper)


def default_path(name: str) -> str:
    """Where the preparation writes a registered data set, and where a run looks for it."""
    return f"{DIRECTORY}/{name}.jsonl"
