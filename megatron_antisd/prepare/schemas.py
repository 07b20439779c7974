"""One published row -> one of our rows, or the reason why it is dropped.

Known by their columns, whatever the file is called: DAPO and other verl data (`prompt` messages, `reward_model`), GSM8K (`answer` ends on
"#### 18"), MATH (`solution` with a box, no answer), AIME, HMMT, Minerva and MATH-500 (problem or question, and answer, in several
spellings), and programming tasks (`code`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_antisd.data.rows import ProblemDataError, plain_problem, user_message, without_instruction
from megatron_antisd.grading.boxes import boxed_list, final_answer
from megatron_antisd.records import Problem

# The spellings of one column, the first that a row has; compared without regard to case, "_" or " ".
TEXT = ("problem", "question", "prompt")
ANSWER = ("answer", "expectedanswer", "finalanswer", "shortanswer")
SOLUTION = ("solution", "samplesolution", "referencesolution")
IDENTIFIER = ("id", "uniqueid", "problemid", "problemidx", "taskid")

GSM8K_ANSWER = "\n#### "
NO_ANSWER, NO_TEXT, NOT_TEXT = "no answer", "no problem text", "a value of the wrong kind"


class Dropped(Exception):
    """A row that cannot be used. `reason` is counted, the message is an example."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason


def read_row(row: Mapping[str, Any], columns: Mapping[str, str], name: str, number: int) -> Problem:
    """`columns` names the data set's columns where they are none of the known spellings: {"problem": "statement"}. Raises Dropped."""
    fields = _fields(row, columns)
    identifier = _identifier(fields.pop("id", None), name, number)
    place = f"row {number}"
    try:
        if isinstance(row.get("reward_model"), Mapping):
            return plain_problem({"id": identifier, "source": row.get("data_source"), **_verl(row, place)}, place, identifier)
        _split_gsm8k(fields)
        _box_of_solution(fields)
        if fields.get("problem") is None:
            raise Dropped(NO_TEXT, f"{place} has the columns {sorted(row)}; name the problem's with --column problem=NAME")
        if fields.get("answer") is None or fields["answer"] == "":
            raise Dropped(NO_ANSWER, f"{place}: {str(fields['problem'])[:80]!r}")
        return plain_problem({**fields, "id": identifier}, place, identifier)
    except ProblemDataError as error:
        raise Dropped(NOT_TEXT, str(error)) from error


def _fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    spelled = {key.lower().replace("_", "").replace(" ", ""): key for key in row}
    fields: dict[str, Any] = {}
    for field, spellings in (("problem", TEXT), ("answer", ANSWER), ("solution", SOLUTION), ("id", IDENTIFIER)):
        named = columns.get(field)
        if named is not None:
            if named not in row:
                raise Dropped(NO_TEXT, f"there is no column {named!r} (--column {field}={named}); the row has {sorted(row)}")
            fields[field] = row[named]
            continue
        found = next((spelled[spelling] for spelling in spellings if row.get(spelled.get(spelling, "")) is not None), None)
        if found is not None:
            fields[field] = row[found]
    return fields


def _verl(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    truth = row["reward_model"].get("ground_truth")
    if truth is None or truth == "":
        raise Dropped(NO_ANSWER, f"{place}: reward_model has no ground_truth")
    return {"problem": without_instruction(user_message(row.get("prompt"), place)), "answer": truth}


def _split_gsm8k(fields: dict[str, Any]) -> None:
    """The answer apart; the solution with its answer in a box, as graders and teachers want it."""
    answer = fields.get("answer")
    if isinstance(answer, str) and GSM8K_ANSWER in answer:
        fields["solution"], fields["answer"] = answer, answer.rpartition(GSM8K_ANSWER)[2].strip().replace(",", "")
    solution = fields.get("solution")
    if isinstance(solution, str) and GSM8K_ANSWER in solution:
        fields.setdefault("answer", solution.rpartition(GSM8K_ANSWER)[2].strip())
        fields["solution"] = f"{solution.rpartition(GSM8K_ANSWER)[0]}\nThe answer is \\boxed{{{fields['answer']}}}."


def _box_of_solution(fields: dict[str, Any]) -> None:
    """MATH's answer is the solution's last box. A boxed answer loses its box."""
    if fields.get("answer") is None and isinstance(fields.get("solution"), str):
        found = final_answer(fields["solution"])
        fields["answer"] = None if found is None else found.joined or found.text
    elif isinstance(fields.get("answer"), str):
        fields["answer"] = boxed_list(fields["answer"]) or fields["answer"]


def identifier_of(row: Mapping[str, Any], name: str, number: int) -> str:
    """The row's own id with the data set's name before it, or the name and the row's number."""
    return _identifier(_fields(row, {}).get("id"), name, number)


def _identifier(value: Any, name: str, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return f"{name}-{number:05d}"
    text = str(value)
    return text if _plain(text).startswith(_plain(name)) else f"{name}-{text}"


def _plain(text: str) -> str:
    return text.lower().replace("_", "-")
