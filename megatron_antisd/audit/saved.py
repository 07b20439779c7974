"""Saved rollouts for the audit: a run's scored ones as they were, or those of `debug.save_rollouts` with their contexts built again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_antisd.config import RunConfig, load_config, rules
from megatron_antisd.data import PromptBuilder, load_tokenizer
from megatron_antisd.grading import GradingPool
from megatron_antisd.grading.building import build_pool
from megatron_antisd.metrics.files import CONFIG
from megatron_antisd.metrics.scored_rollouts import read_scored, scored_files
from megatron_antisd.records import RolloutGroup, ScoredGroup, ScoredRollout
from megatron_antisd.rollout.replay import read_rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase



class AuditError(ValueError):
    """The rollouts cannot be audited; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class SavedRollouts:
    """One file, and what is needed to read it."""

    path: Path
    step: int
    groups: tuple[ScoredGroup, ...]
    config: RunConfig
    prompts: PromptBuilder
    tokenizer: PreTrainedTokenizerBase

    def open_grader(self) -> GradingPool:
        return build_pool(self.config.grading, [group.problem for group in self.groups])


def open_saved(path: Path, step: int | None, config_path: Path | None, model: str | None) -> Iterator[SavedRollouts]:
    """The files that `path` means. Raises AuditError, FileNotFoundError, or what reading configuration, tokenizer and files raises."""
    for file in _files(path, step):
        config = load_config(config_path or _config_above(file))
        folder = Path(model or config.model.path)
        if not (folder / "config.json").is_file():
            raise AuditError(f"{folder} has no config.json: the audit needs the run's model directory for its tokenizer; name it with --model")
        description = json.loads((folder / "config.json").read_text())
        tokenizer = load_tokenizer(folder, description["vocab_size"])
        prompts = PromptBuilder(tokenizer, config.data, config.privileged, rules.max_context(config, description))
        found, groups = _groups(file, config, prompts)
        yield SavedRollouts(path=file, step=found, groups=groups, config=config, prompts=prompts, tokenizer=tokenizer)


def _files(path: Path, step: int | None) -> list[Path]:
    if path.is_file():
        return [path]
    files = scored_files(path) or sorted(path.glob("step_*.jsonl"))
    if not files:
        raise AuditError(f"{path} holds no saved rollouts; a run writes them at evaluation steps (logging.rollout_groups), and at every step "
                         "with debug.save_rollouts")
    if step is None:
        return files[-1:]
    chosen = [file for file in files if _step_of(file) == step]
    if not chosen:
        raise AuditError(f"{path} has no rollouts of step {step}; it has steps {[_step_of(file) for file in files]}")
    return chosen


def _step_of(file: Path) -> int:
    number = file.stem.removeprefix("step_")
    if not number.isdecimal():
        raise AuditError(f"{file}: the name does not say a step; expected step_000010.jsonl")
    return int(number)


def _config_above(file: Path) -> Path:
    for folder in file.resolve().parents[:3]:
        if (folder / CONFIG).is_file():
            return folder / CONFIG
    raise AuditError(f"{file}: no {CONFIG} in the folders above it; name the run's with --config")


def _groups(file: Path, config: RunConfig, prompts: PromptBuilder) -> tuple[int, tuple[ScoredGroup, ...]]:
    with file.open("rb") as lines:
        scored = b'"token_text"' in lines.readline()
    if scored:
        content = read_scored(file)
        return content.step, content.groups
    step = _step_of(file)
    return step, tuple(_rebuilt(group, prompts, config.run.seed, step) for group in read_rollouts(file))


def _rebuilt(group: RolloutGroup, prompts: PromptBuilder, seed: int, step: int) -> ScoredGroup:
    """A group that was saved without its contexts: they follow from rewards, seed and step."""
    views = prompts.privileged_views(group, seed=seed, step=step)
    return ScoredGroup(problem=group.problem, rollouts=tuple(
        ScoredRollout(rollout=rollout, privileged=view, student_log_prob=None, teacher_log_prob=None)
        for rollout, view in zip(group.rollouts, views, strict=True)))
