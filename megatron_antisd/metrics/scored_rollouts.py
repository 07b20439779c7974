"""Scored rollouts in a run directory: `rollouts/step_000010.jsonl`, what the u-lens draws and the context audit checks.

The first line is a header: `step`, `method` and `token_text`, the text of every token id that occurs, so that no tokenizer is needed to
read the file. Then one group a line. A prompt that several rollouts share is written once; experts (`Rollout.routes`) are left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_antisd.durable import write_whole
from megatron_antisd.metrics.files import ROLLOUTS, MetricsError, json_line
from megatron_antisd.records import PrivilegedView, ScoredGroup, ScoredRollout, ScoringView, problem_from_json, rollout_from_json


@dataclass(frozen=True, kw_only=True)
class ScoredStep:
    """One file: the groups of a step."""

    step: int
    method: str
    token_text: Mapping[int, str]
    """Text of each token id of a prompt or a response; a token that is part of a character has a replacement character."""
    groups: tuple[ScoredGroup, ...]


def write_scored(directory: Path, step: int, method: str, groups: Sequence[ScoredGroup], token_text: Callable[[int], str]) -> Path:
    """Write `directory/step_<step>.jsonl`, whole or not at all."""
    path = directory / f"step_{step:06d}.jsonl"
    directory.mkdir(parents=True, exist_ok=True)
    rows = [_group_row(group) for group in groups]
    used = {token for row in rows for ids in (*row["prompts"], *(r["response_ids"] for r in row["rollouts"])) for token in ids}
    header = {"step": step, "method": method, "token_text": {token: token_text(token) for token in sorted(used)}}
    write_whole(path, map(json_line, (header, *rows)))
    return path


def scored_files(run_directory: Path) -> list[Path]:
    """The files of a run, in the order of steps; empty where it wrote none."""
    return sorted((run_directory / ROLLOUTS).glob("step_*.jsonl"))


def read_scored(path: Path) -> ScoredStep:
    """Read a file back, equal to what was written less the rollouts' routes. Raises FileNotFoundError, or MetricsError that names the line and what
    is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run writes scored rollouts at evaluation steps (logging.rollout_groups)")
    rows = []
    for number, line in enumerate(path.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            row = json.loads(line)
            rows.append(_header(row) if number == 1 else _group(row))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise MetricsError(f"{path} line {number} holds no {'header' if number == 1 else 'group'} of scored rollouts "
                               f"({type(error).__name__}: {error}): {line[:80]!r}") from error
    header, *groups = rows
    return ScoredStep(**header, groups=tuple(groups))


def _group_row(group: ScoredGroup) -> dict[str, Any]:
    prompts: list[tuple[int, ...]] = []
    rollouts = []
    for scored in group.rollouts:
        fields = dataclasses.asdict(scored.rollout)
        del fields["routes"]  # hundreds of bytes a token, which no reader of these files looks at
        view = scored.privileged
        for ids in (scored.rollout.prompt_ids, *((view.view.prompt_ids,) if view.view else ())):
            if ids not in prompts:
                prompts.append(ids)
        fields["prompt"] = prompts.index(fields.pop("prompt_ids"))
        fields["privileged"] = {"prompt": prompts.index(view.view.prompt_ids) if view.view else None, "source": view.source,
                                "shown_index": view.shown_index, "cut_tokens": view.cut_tokens}
        fields["student_log_prob"], fields["teacher_log_prob"] = scored.student_log_prob, scored.teacher_log_prob
        rollouts.append(fields)
    return {"problem": dataclasses.asdict(group.problem), "prompts": prompts, "rollouts": rollouts}


def _header(row: dict[str, Any]) -> dict[str, Any]:
    return {"step": row["step"], "method": row["method"], "token_text": {int(token): text for token, text in row["token_text"].items()}}


def _group(row: dict[str, Any]) -> ScoredGroup:
    prompts = [tuple(ids) for ids in row["prompts"]]
    return ScoredGroup(problem=problem_from_json(row["problem"]), rollouts=tuple(_scored(fields, prompts) for fields in row["rollouts"]))


def _scored(fields: dict[str, Any], prompts: Sequence[tuple[int, ...]]) -> ScoredRollout:
    privileged, student, teacher = (fields.pop(name) for name in ("privileged", "student_log_prob", "teacher_log_prob"))
    prompt_ids = prompts[fields.pop("prompt")]
    rollout = rollout_from_json({**fields, "prompt_ids": prompt_ids})
    place = privileged.pop("prompt")
    view = None if place is None else ScoringView(prompt_ids=prompts[place], response_ids=rollout.response_ids)
    return ScoredRollout(rollout=rollout, privileged=PrivilegedView(view=view, **privileged),
                         student_log_prob=None if student is None else tuple(student),
                         teacher_log_prob=None if teacher is None else tuple(teacher))
