"""Scored rollouts packed for the u-lens: small texts, and whole numbers in chunks that the browser unpacks when they are looked at.

Log-probs are rounded to multiples of QUANTUM. A page keeps log pi_S and u, so those are within QUANTUM / 2 of the file's and log pi_T
is within QUANTUM. Means, shares, tables and the heat map are computed from the file's own numbers.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_antisd.metrics import MetricsError
from megatron_antisd.metrics.scored_rollouts import ScoredStep
from megatron_antisd.records import ScoredGroup, ScoredRollout

QUANTUM = 1 / 4096  # nats
LARGEST = 1e5  # nats; beyond it a rounded value would not fit into 32 bits
SPECIAL = re.compile(r"<\|[^|<>]*\|>|<｜[^｜<>]*｜>|</?(?:s|pad|unk|bos|eos|system|user|assistant|think|tool_call|tool_response)>|")


@dataclass(frozen=True, kw_only=True)
class TokenValues:
    """Every response token that has both log-probs, N of them over all steps."""

    step: np.ndarray
    """[N] int64, the step's number."""
    token: np.ndarray
    """[N] int64, token ids."""
    student: np.ndarray
    """[N] float64, nats."""
    teacher: np.ndarray
    """[N] float64, nats."""

    @property
    def u(self) -> np.ndarray:
        return self.teacher - self.student


def packed(values: np.ndarray) -> str:
    """Whole numbers of 32 bits as base64 of a zlib stream of their four byte planes, lowest first.

    Signs are folded into the lowest bit (0, -1, 1, -2 -> 0, 1, 2, 3), so that the upper planes of small numbers are zero and cost nothing.
    """
    numbers = values.astype("<i4")
    folded = np.left_shift(numbers, 1) ^ np.right_shift(numbers, 31)
    planes = np.ascontiguousarray(folded.astype("<i4").view(np.uint8).reshape(-1, 4).T)
    return _compressed(planes.tobytes())


def packed_text(value: Any) -> str:
    """JSON as base64 of a zlib stream: nothing in it can end the page's data block."""
    return _compressed(json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace"))


def _compressed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")


class Packer:
    """Takes the files of a run one after the other, so that only one is in memory as records."""

    def __init__(self) -> None:
        self.chunks: list[str] = []
        self.rollouts: list[dict[str, Any]] = []
        self.problems: list[dict[str, str]] = []
        self.prompts: list[int] = []
        """The chunk of each prompt."""
        self.steps: list[int] = []
        self.token_text: dict[int, str] = {}
        self._values: list[tuple[np.ndarray, ...]] = []

    def add(self, path: Path, step: ScoredStep) -> None:
        """Raises MetricsError, which names the file, for values that do not belong together."""
        for token, text in step.token_text.items():
            if self.token_text.setdefault(token, text) != text:
                raise MetricsError(f"{path}: token {token} is {text!r} here and {self.token_text[token]!r} in an earlier file; "
                                   "these files come from different tokenizers, make a page of each")
        self.steps.append(step.step)
        for group in step.groups:
            try:
                self._add_group(step.step, group)
            except ValueError as error:
                raise MetricsError(f"{path}, problem {group.problem.id!r}: {error}") from error

    def values(self) -> TokenValues:
        empty = np.empty(0)
        step, token, student, teacher = (np.concatenate(parts) for parts in zip((empty, empty, empty, empty), *self._values, strict=True))
        return TokenValues(step=step.astype(np.int64), token=token.astype(np.int64), student=student, teacher=teacher)

    def tokens(self) -> dict[str, Any]:
        """The text of every token, and which of them are special."""
        ids = sorted(self.token_text)
        return {"ids": ids, "texts": [self.token_text[token] for token in ids],
                "special": [token for token in ids if SPECIAL.fullmatch(self.token_text[token])]}

    def _chunk(self, *parts: np.ndarray) -> int:
        self.chunks.append(packed(np.concatenate(parts)))
        return len(self.chunks) - 1

    def _add_group(self, step: int, group: ScoredGroup) -> None:
        problem = group.problem
        self.problems.append({"id": problem.id, "prompt": problem.prompt, "answer": problem.answer, "origin": problem.source})
        first = len(self.rollouts)
        place = {scored.rollout.index: first + number for number, scored in enumerate(group.rollouts)}
        prompts: dict[tuple[int, ...], int] = {}
        for scored in group.rollouts:
            row = self._row(step, scored)
            views = [scored.rollout.prompt_ids, scored.privileged.view.prompt_ids if scored.privileged.view else None]
            student, privileged = (None if ids is None else self._prompt(ids, prompts) for ids in views)
            row |= {"problem": len(self.problems) - 1, "prompt": student, "privileged": privileged,
                    "shown": place.get(scored.privileged.shown_index)}
            self.rollouts.append(row)

    def _prompt(self, ids: tuple[int, ...], known: dict[tuple[int, ...], int]) -> int:
        if ids not in known:
            self._check_texts(ids)
            known[ids] = len(self.prompts)
            self.prompts.append(self._chunk(np.asarray(ids, dtype=np.int64)))
        return known[ids]

    def _row(self, step: int, scored: ScoredRollout) -> dict[str, Any]:
        rollout, view = scored.rollout, scored.privileged
        where = f"rollout {rollout.index}"
        ids = np.asarray(rollout.response_ids, dtype=np.int64)
        self._check_texts(rollout.response_ids)
        student = _log_probs(f"{where}: student_log_prob", scored.student_log_prob, len(ids))
        teacher = _log_probs(f"{where}: teacher_log_prob", scored.teacher_log_prob, len(ids))
        parts, mean, share = [ids], None, None
        if student is not None:
            parts.append(np.rint(student / QUANTUM))
        if teacher is not None:
            parts.append(np.rint((teacher if student is None else teacher - student) / QUANTUM))
        if student is not None and teacher is not None:
            u = teacher - student
            mean, share = float(u.mean()), float((u < 0).mean())
            self._values.append((np.full(len(ids), step), ids, student, teacher))
        return {"step": step, "index": rollout.index, "reward": rollout.reward, "truncated": rollout.truncated, "tokens": len(ids),
                "mean": mean, "share": share, "source": view.source, "shownIndex": view.shown_index, "cut": view.cut_tokens,
                "feedback": rollout.feedback, "version": rollout.policy_version, "student": student is not None,
                "teacher": teacher is not None, "chunk": self._chunk(*parts)}

    def _check_texts(self, ids: Sequence[int]) -> None:
        missing = next((token for token in ids if token not in self.token_text), None)
        if missing is not None:
            raise ValueError(f"token {missing} has no text in the header's token_text")


def _log_probs(what: str, values: Sequence[float] | None, tokens: int) -> np.ndarray | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (tokens,):
        raise ValueError(f"{what} has {len(array)} values for {tokens} response tokens; they must be equal in number")
    if not (np.abs(array) <= LARGEST).all():  # also false for NaN
        raise ValueError(f"{what} holds {array[~(np.abs(array) <= LARGEST)][0]}; a log-prob is a finite number of nats")
    return array
