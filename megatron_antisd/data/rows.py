"""One row of a data file -> Problem. The schemas that are accepted stand in `problems`; an error names the row's place and the reason."""

from __future__ import annotations

import decimal
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_antisd.records import CodeTests, Problem, code_tests_from_json

logger = logging.getLogger(__name__)

TEXT_KEYS = ("problem", "question", "prompt")
COLUMNS = {"id", "answer", "solution", "source", "tests", "reward_model", "extra_info", "data_source", *TEXT_KEYS}
"""All that is read of a row."""
DAPO_BEFORE = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer: [^\n]*\n\n"
)
DAPO_AFTER = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*\Z")


class ProblemDataError(ValueError):
    """A data file cannot be used; the message holds file, row, reason and what was expected."""


def plain_problem(row: Mapping[str, Any], place: str, default_id: str) -> Problem:
    """A row of the schemas `problem`, `question` and `prompt`."""
    key = next((k for k in TEXT_KEYS if row.get(k) is not None), None)
    if key is None:
        raise ProblemDataError(f"{place}: no problem text; expected one of the keys {', '.join(TEXT_KEYS)}, got {sorted(row)}")
    tests = _tests(row, place)
    answer = _answer(row.get("answer"), place, "answer") if tests is None else ""
    if "\n#### " in answer:
        raise ProblemDataError(f"{place}: `answer` is a worked solution ending in '####' (GSM8K's format); put the final value "
                               "into `answer` and the text into `solution`")
    return Problem(id=_identifier(row.get("id"), place, default_id), prompt=required_text(row[key], place, key), answer=answer, tests=tests,
                   solution=_optional_text(row.get("solution"), place, "solution"),
                   source=_optional_text(row.get("source"), place, "source") or "")


def _tests(row: Mapping[str, Any], place: str) -> CodeTests | None:
    """A programming task's tests; None where the row has none."""
    if row.get("tests") is None:
        return None
    try:
        tests = code_tests_from_json(row["tests"])
        broken = [case for case in tests.cases if not all(isinstance(part, str) for part in case)]
    except (TypeError, ValueError, AttributeError) as error:
        raise ProblemDataError(f"{place}: `tests` is {row['tests']!r:.80} ({error}); expected an object such as "
                               '{"entry_point": "add", "cases": [["(1, 2)", "3"]]}') from error
    if broken:
        raise ProblemDataError(f"{place}: a test case is {broken[0]!r:.80}, expected [input, expected output], both text")
    if tests.count == 0:
        raise ProblemDataError(f"{place}: `tests` holds neither cases nor assertions; a program without tests cannot be graded")
    return tests


class PublishedRows:
    """Rows of the `verl` schema in one file: drops copies, remembers texts with contradicting answers."""

    def __init__(self) -> None:
        self._answers: dict[str, set[str]] = {}
        self._places: dict[str, list[str]] = {}
        self._copies = 0
        self._unwrapped = 0

    def take(self, row: Mapping[str, Any], place: str, default_id: str) -> Problem | None:
        """The row's problem; None for a copy of an earlier row."""
        published = user_message(row.get("prompt"), place)
        answer = _answer(row["reward_model"].get("ground_truth"), place, "reward_model.ground_truth")
        text = without_instruction(published)
        answers = self._answers.setdefault(text, set())
        if answer in answers:
            self._copies += 1
            return None
        answers.add(answer)
        self._places.setdefault(text, []).append(place)
        self._unwrapped += text != published
        source = _optional_text(row.get("data_source"), place, "data_source") or ""
        index = row["extra_info"].get("index") if isinstance(row.get("extra_info"), dict) else None
        identifier = _identifier(index, place, "")
        return Problem(id=f"{source}-{identifier}" if identifier else default_id, prompt=text, answer=answer, source=source)

    def without_contradictions(self, rows: list[tuple[str, Problem]], path: Path) -> list[tuple[str, Problem]]:
        """`rows` less the problems whose text came with several answers; logs the three counts."""
        bad = {text for text, answers in self._answers.items() if len(answers) > 1}
        if self._copies:
            logger.info("%s: dropped %d rows that repeat an earlier row's problem and answer", path, self._copies)
        if self._unwrapped:
            logger.info("%s: took the instruction to end on 'Answer:' off %d problems", path, self._unwrapped)
        if bad:
            examples = "; ".join(" against ".join(self._places[text]) for text in sorted(bad)[:3])
            logger.warning("%s: dropped %d problems that occur with different answers (%s)", path, len(bad), examples)
        return [(place, problem) for place, problem in rows if problem.prompt not in bad]


def without_instruction(text: str) -> str:
    """DAPO's instruction around the problem taken off, where both halves are there."""
    before, after = DAPO_BEFORE.search(text), DAPO_AFTER.search(text)
    if before is None or after is None or before.end() >= after.start():
        return text
    return text[before.end():after.start()].strip()


def user_message(messages: Any, place: str) -> str:
    if not isinstance(messages, list) or [m.get("role") if isinstance(m, dict) else m for m in messages] != ["user"]:
        got = [m.get("role") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else type(messages).__name__
        raise ProblemDataError(f"{place}: `prompt` must hold exactly one user message, got {got}; "
                               "a system prompt belongs into data.system_prompt")
    return required_text(messages[0].get("content"), place, "prompt[0].content")


def required_text(value: Any, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise ProblemDataError(f"{place}: `{key}` must be text, got {type(value).__name__} {value!r:.80}")
    if not value.strip():
        raise ProblemDataError(f"{place}: `{key}` is empty")
    return value.strip()


def _optional_text(value: Any, place: str, key: str) -> str | None:
    """Blank text counts as absent."""
    return None if value is None or value == "" or (isinstance(value, str) and not value.strip()) else required_text(value, place, key)


def _answer(value: Any, place: str, key: str) -> str:
    """Text, or a finite number written out without an exponent: 34 -> "34", 1e-05 -> "0.00001"."""
    if value is None:
        raise ProblemDataError(f"{place}: `{key}` is missing; every problem needs the answer the grader compares with")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ProblemDataError(f"{place}: `{key}` is {value}, expected text or a finite number")
        return format(decimal.Decimal(repr(value)), "f")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return required_text(value, place, key)


def _identifier(value: Any, place: str, default: str) -> str:
    if value is None:
        return default
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else required_text(value, place, "id")
