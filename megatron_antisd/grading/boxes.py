"""Where a response's final answer stands: its boxes, and what follows the last of them. One pass, linear in the length."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

THINKING_END = "</think>"
MAX_JOINED_BOXES = 32
"""Boxes in a row that are tried as one list; with more than these the last one counts alone."""

_BRACE_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# What may stand between two boxes that together are one answer: `\boxed{2} \quad \text{and} \quad \boxed{6}`.
_CONNECTIVE = re.compile(r"(?:\s|[$.,;&]|\\[\[\]()]|\\(?:qquad|quad|[,;:! ])|\\(?:text|mbox|textrm)\s*\{[^{}]*\}|\b(?:and|or)\b)*")
# The closing sentence of the Minerva prompt; models trained on it repeat it after their box.
_STATEMENT_START, _STATEMENT_END = "inal answer is", "I hope it is correct"


@dataclass(frozen=True, kw_only=True)
class FinalAnswer:
    """What a response gives as its answer. Example: `FinalAnswer(text="6", joined="2, 6")` of `\\boxed{2}, \\boxed{6}`."""

    text: str
    """The content of the last complete box, or the sentence that replaces it."""
    joined: str | None = None
    """The boxes at the end that directly follow each other, as one list; None where the last stands alone."""
    stated: bool = False
    """`text` is from the closing sentence "The final answer is ... I hope it is correct." behind the last box."""


class _Box(NamedTuple):
    """Places in the text. The content is cut out only where it is needed: copies of nested boxes would be quadratic."""

    start: int
    end: int
    inner: int
    """Where the content begins; it ends one brace before `end`."""

    def content(self, text: str) -> str:
        return text[self.inner : self.end - 1].strip()


def final_answer(response: str) -> FinalAnswer | None:
    """The answer of a response, from what stands behind the last `</think>`; None without a complete box.

    The last box counts, whatever stood in earlier ones. Only the literal closing sentence of the Minerva prompt
    ("The final answer is ... I hope it is correct.") behind that box is later still, and replaces it.
    """
    final = response.rpartition(THINKING_END)[2]
    boxes = _boxes(final)
    if not boxes:
        return None
    stated = _statement(final[boxes[-1].end :])
    if stated:
        return FinalAnswer(text=stated, stated=True)
    run = _last_run(final, boxes)
    joined = ", ".join(box.content(final) for box in run) if len(run) > 1 else None
    return FinalAnswer(text=boxes[-1].content(final), joined=joined)


def boxed_list(text: str) -> str | None:
    """The contents of all boxes of a reference answer (of the last, beyond MAX_JOINED_BOXES) as one list; None without a box."""
    boxes = _boxes(text)
    return ", ".join(box.content(text) for box in (boxes if len(boxes) <= MAX_JOINED_BOXES else boxes[-1:])) if boxes else None


def _boxes(text: str) -> list[_Box]:
    """Every complete `\\boxed{...}` in the order of its beginning; one pass, braces may nest and may be escaped."""
    found: list[_Box] = []
    open_braces: list[tuple[int, int] | None] = []  # (start of the command, start of the content), None for a plain brace
    for token in _BRACE_TOKEN.finditer(text):
        if token[0] == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                found.append(_Box(opened[0], token.end(), opened[1]))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append((token.start(), token.end()))
    return sorted(found)


def _last_run(text: str, boxes: list[_Box]) -> list[_Box]:
    """The boxes at the end of the list between which only connectives stand; the last alone where there are too many."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if box.end > run[0].start or not _CONNECTIVE.fullmatch(text, box.end, run[0].start):
            return run
        if len(run) == MAX_JOINED_BOXES:
            return run[-1:]
        run.insert(0, box)
    return run


def _statement(tail: str) -> str | None:
    end = tail.rfind(_STATEMENT_END)
    start = tail.rfind(_STATEMENT_START, 0, end) if end >= 0 else -1
    if start < 0 or r"\boxed" in tail[start:end]:
        return None
    return tail[start + len(_STATEMENT_START) : end].strip().lstrip(":").rstrip(". ").strip("\"'\\ \n") or None
