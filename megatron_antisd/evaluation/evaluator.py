"""One evaluation: every benchmark sampled with the engine's present policy, graded, stored and summarised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_antisd.config import BenchmarkConfig, RunConfig
from megatron_antisd.data import PromptBuilder
from megatron_antisd.data.problems import fingerprint
from megatron_antisd.evaluation.statistics import summarise
from megatron_antisd.evaluation.store import SampleStore, graded_sample, store_path
from megatron_antisd.evaluation.votes import final_vote
from megatron_antisd.grading import GradingPool
from megatron_antisd.grading.groups import EarlyGrading
from megatron_antisd.inputs import Inputs
from megatron_antisd.metrics import MetricsWriter
from megatron_antisd.records import Problem, RolloutGroup
from megatron_antisd.rollout.engine import Engine, Sampling
from megatron_antisd.rollout.groups import generate_groups

T = TypeVar("T")
_log = logging.getLogger(__name__)

EVALUATION_SEED = 20_000_000
"""Added to the run's seed: evaluations draw the same numbers at every step, and none that training draws."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What an evaluation needs. `directory` holds metrics.jsonl and gets `evaluations/`."""

    config: RunConfig
    engine: Engine
    prompts: PromptBuilder
    grader: GradingPool
    benchmarks: Mapping[str, Sequence[Problem]]
    stop_token_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    directory: Path
    is_main: bool

    def evaluate(self, metrics: MetricsWriter, step: int, policy: str, pause: Callable[[], None] | None = None) -> None:
        """Sample, grade, store and log. Collective. `policy` names the weights: samples of other weights are never taken for theirs.
        An evaluation that was interrupted goes on where its stored samples end. A truncated response counts as graded. `pause` is called, on
        all ranks, before each part; what it raises interrupts the evaluation."""
        values: dict[str, float] = {}
        shown: list[dict[str, Any]] = []
        for benchmark in self.config.evaluation.benchmarks:
            store = self._store(benchmark, step, policy)
            failures = self._complete(benchmark, store, pause)
            if store is not None:
                problems = self.benchmarks[benchmark.name]
                values |= summarise(benchmark.name, [[graded_sample(row) for row in store.rows(p.id)] for p in problems])
                values |= {f"eval/{benchmark.name}/{key}": count for key, count in failures.items()}
                shown += self._shown(benchmark.name, store)
        metrics.log_samples(step, shown)
        metrics.log_evaluation(step, values)

    def _store(self, benchmark: BenchmarkConfig, step: int, policy: str) -> SampleStore | None:
        """On the main rank alone."""
        if not self.is_main:
            return None
        header = {
            "benchmark": benchmark.name, "step": step, "policy": policy, "samples": benchmark.samples, "seed": self.config.run.seed,
            "sampling": asdict(self._sampling()), "problems": fingerprint(self.benchmarks[benchmark.name]),
            "prompts": {"template": self.config.data.prompt_template, "system": self.config.data.system_prompt,
                        "chat_template_kwargs": self.config.data.chat_template_kwargs},
            "grader": self.config.grading.function or "built-in", "engine": self.config.rollout.engine, "dtype": self.config.model.dtype}
        return SampleStore(store_path(self.directory, step, benchmark.name), header, patient=self.config.checkpoint.on_failure == "continue")

    def _complete(self, benchmark: BenchmarkConfig, store: SampleStore | None, pause: Callable[[], None] | None) -> dict[str, int]:
        """Sample and grade the problems that are not stored yet, a part at a time. How often the grader failed on them, scoring 0."""
        failures = {"grader_timeouts": 0, "grader_crashes": 0}
        problems = self.benchmarks[benchmark.name]
        missing = agreed(None if store is None else [i for i, p in enumerate(problems) if not store.complete(p.id)])
        at_once = max(1, self.config.evaluation.samples_at_once // benchmark.samples)
        for start in range(0, len(missing), at_once):
            if pause is not None:
                pause()
            part = [problems[i] for i in missing[start : start + at_once]]
            with EarlyGrading(self.grader, part, benchmark.samples, self.decode) as grading:
                groups = generate_groups(
                    self.engine, part, [self.prompts.student_prompt(p) for p in part], sampling=self._sampling(), group_size=benchmark.samples,
                    seed=self.config.run.seed + EVALUATION_SEED, step=0, decode=self.decode, finished=grading)
            graded = grading.complete(groups, self.config.privileged)
            failures["grader_timeouts"] += graded.timeouts
            failures["grader_crashes"] += graded.crashes
            if store is not None:
                store.append({group.problem.id: _rows(group) for group in graded.groups})
                if len(missing) > at_once:
                    _log.info("evaluation of %s: %d of %d problems", benchmark.name, len(problems) - len(missing) + start + len(part), len(problems))
        return failures

    def _sampling(self) -> Sampling:
        settings = self.config.evaluation
        return Sampling(temperature=settings.temperature, top_p=settings.top_p, stop_token_ids=self.stop_token_ids,
                        max_new_tokens=settings.max_new_tokens or self.config.rollout.max_new_tokens)

    def _shown(self, benchmark: str, store: SampleStore) -> list[dict[str, Any]]:
        """The first sample of the first problems, as text."""
        shown = self.benchmarks[benchmark][: self.config.logging.samples_per_evaluation]
        firsts = [(problem, store.rows(problem.id)[0]) for problem in shown]
        return [{"benchmark": benchmark, "problem_id": problem.id, "prompt": problem.prompt, "response": row["text"], "reward": row["reward"],
                 "truncated": row["truncated"]} for problem, row in firsts]


def build_evaluator(config: RunConfig, inputs: Inputs, engine: Engine, directory: Path, *, is_main: bool) -> Evaluator:
    def decode(ids: Sequence[int]) -> str:
        return inputs.tokenizer.decode(list(ids), skip_special_tokens=True)

    return Evaluator(config=config, engine=engine, prompts=inputs.prompts, grader=inputs.grader, benchmarks=inputs.benchmarks,
                     stop_token_ids=inputs.stop_token_ids, decode=decode, directory=directory, is_main=is_main)


def _rows(group: RolloutGroup) -> list[dict[str, Any]]:
    return [{"problem_id": r.problem_id, "index": r.index, "reward": r.reward, "feedback": r.feedback, "truncated": r.truncated,
             "tokens": len(r.response_ids), "answer": final_vote(r.text, group.problem.tests), "text": r.text}
            for r in group.rollouts]


def agreed(value: T) -> T:
    """The main rank's value on every rank."""
    holder = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(holder, src=0)
    return holder[0]
