"""What a run or an evaluation reads, and checks before anything heavy starts: configuration rules, tokenizer, problems, prompts, graders."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_antisd.config import ConfigError, RunConfig, rules
from megatron_antisd.data import ProblemDataError, PromptBuilder, load_problems, load_tokenizer, stop_token_ids
from megatron_antisd.grading import GradingPool
from megatron_antisd.grading.building import build_pool
from megatron_antisd.records import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Inputs:
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    """Of data.train; empty where nothing is trained."""
    benchmarks: dict[str, list[Problem]]
    prompts: PromptBuilder
    max_context: int
    stop_token_ids: tuple[int, ...]
    grader: GradingPool


def read_inputs(config: RunConfig, *, training: bool) -> Inputs:
    """Raises ConfigError, ProblemDataError, PromptError or GradingError, each with what to change."""
    model = read_model_config(config)
    rules.check(config, model, int(os.environ.get("WORLD_SIZE", "1")), training=training)
    tokenizer = load_tokenizer(config.model.path, model["vocab_size"])
    problems = load_problems(config.data.train) if training else []
    benchmarks = {b.name: load_problems([b.path]) for b in config.evaluation.benchmarks}
    context = rules.max_context(config, model)
    prompts = PromptBuilder(tokenizer, config.data, config.privileged, context)
    if training:
        prompts.require_room(problems, config.rollout.max_new_tokens, "rollout.max_new_tokens")
    own_limit = config.evaluation.max_new_tokens
    for name, held_out in benchmarks.items():
        _check_repetitions(name, held_out)
        prompts.require_room(held_out, own_limit or config.rollout.max_new_tokens,
                             "evaluation.max_new_tokens" if own_limit else "rollout.max_new_tokens")
    return Inputs(
        tokenizer=tokenizer, problems=problems, benchmarks=benchmarks, prompts=prompts, max_context=context,
        stop_token_ids=stop_token_ids(tokenizer, config.model.path),
        grader=build_pool(config.grading, [*problems, *(problem for held_out in benchmarks.values() for problem in held_out)]))


def _check_repetitions(name: str, problems: list[Problem]) -> None:
    """A benchmark that holds a problem twice weighs it twice."""
    seen: dict[str, str] = {}
    for problem in problems:
        text = " ".join(problem.prompt.split())
        if text in seen:
            raise ProblemDataError(f"benchmark {name!r}: problems {seen[text]!r} and {problem.id!r} are the same text; drop one, or prepare the file "
                                   "with tools/prepare_data.py, which drops and counts copies")
        seen[text] = problem.id


def read_model_config(config: RunConfig) -> dict[str, Any]:
    """The parsed config.json of the model. Raises ConfigError."""
    path = Path(config.model.path) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path: no config.json in {config.model.path}; expected a Hugging Face checkpoint directory")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON: {error}") from error
