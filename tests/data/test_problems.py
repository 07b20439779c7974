"""Reading problems: every accepted schema, and one test for each way a file can be bad."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_antisd.data import ProblemDataError, load_problems
from megatron_antisd.records import Problem

WRAP = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
        "quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\".")


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def published(text: str, answer: str, index: int | str) -> dict[str, Any]:
    return {"data_source": "math_dapo", "prompt": [{"role": "user", "content": text}], "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule"}, "extra_info": {"index": index}}


def test_plain_rows_of_both_formats_are_equal(tmp_path: Path) -> None:
    rows = [{"id": "a", "problem": "2+2?", "answer": "4", "solution": "count", "source": "s"},
            {"id": "b", "problem": "1+1?", "answer": "2", "solution": None, "source": None}]
    expected = [Problem(id="a", prompt="2+2?", answer="4", solution="count", source="s"), Problem(id="b", prompt="1+1?", answer="2")]
    assert load_problems([write_jsonl(tmp_path / "p.jsonl", *rows)]) == expected
    assert load_problems([write_parquet(tmp_path / "p.parquet", *rows)]) == expected


@pytest.mark.parametrize("key", ["problem", "question", "prompt"])
def test_text_keys(tmp_path: Path, key: str) -> None:
    (problem,) = load_problems([write_jsonl(tmp_path / "p.jsonl", {key: "2+2?", "answer": "4"})])
    assert (problem.prompt, problem.id) == ("2+2?", "p.jsonl:1")


@pytest.mark.parametrize(("given", "expected"), [(34, "34"), (-3, "-3"), (0, "0"), (0.5, "0.5"), (1e-5, "0.00001"), (10**400, "1" + "0" * 400)],
                         ids=range(6))
def test_numbers_become_text(tmp_path: Path, given: int | float, expected: str) -> None:
    (problem,) = load_problems([write_jsonl(tmp_path / "p.jsonl", {"problem": "x", "answer": given})])
    assert problem.answer == expected


def test_blank_lines_line_separators_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('\ufeff{"problem": "one\u2028two", "answer": "1"}\n\n{"problem": "three", "answer": "3"}\n', encoding="utf-8")
    assert [(p.id, p.prompt) for p in load_problems([path])] == [("p.jsonl:1", "one\u2028two"), ("p.jsonl:3", "three")]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_published_rows(tmp_path: Path, extension: str, caplog: pytest.LogCaptureFixture) -> None:
    """Copies dropped (same index, and another index), the instruction taken off, contradictions dropped; all counted."""
    rows = [published(WRAP.format("one?"), "1", "i1"), published(WRAP.format("two?"), "2", "i2")] * 3
    rows += [published("two?", "2", "i9"), published("odd?", "5", "i3"), published("odd?", "6", "i4"), published("six?", "6", "i6")]
    path = tmp_path / f"p.{extension}"
    with caplog.at_level(logging.INFO, logger="megatron_antisd.data"):
        problems = load_problems([(write_jsonl if extension == "jsonl" else write_parquet)(path, *rows)])
    assert [(p.id, p.prompt, p.answer, p.source) for p in problems] == [
        ("math_dapo-i1", "one?", "1", "math_dapo"), ("math_dapo-i2", "two?", "2", "math_dapo"), ("math_dapo-i6", "six?", "6", "math_dapo")]
    assert "dropped 5 rows that repeat" in caplog.text
    assert "off 2 problems" in caplog.text
    assert "dropped 1 problems that occur with different answers" in caplog.text


def test_half_an_instruction_stays(tmp_path: Path) -> None:
    text = WRAP.format("one?").removesuffix(' after "Answer:".')
    (problem,) = load_problems([write_jsonl(tmp_path / "p.jsonl", published(text, "1", 0))])
    assert problem.prompt == text


GOOD = {"id": "g", "problem": "2+2?", "answer": "4"}
BAD_ROWS = [
    ('{"problem": "x", ', "line 2: malformed JSON"),
    ('["x", "4"]', "line 2: holds a list, expected a JSON object"),
    ({"problem": "x"}, "line 2: `answer` is missing"),
    ({"problem": "x", "answer": None}, "line 2: `answer` is missing"),
    ({"problem": "x", "answer": "  "}, "line 2: `answer` is empty"),
    ({"problem": "x", "answer": True}, "line 2: `answer` must be text, got bool"),
    ({"problem": "x", "answer": [4]}, "line 2: `answer` must be text, got list"),
    ('{"problem": "x", "answer": NaN}', "line 2: `answer` is nan"),
    ({"answer": "4"}, "line 2: no problem text; expected one of the keys problem, question, prompt"),
    ({"problem": "", "answer": "4"}, "line 2: `problem` is empty"),
    ({"problem": 7, "answer": "4"}, "line 2: `problem` must be text, got int"),
    ({"problem": "x", "answer": "4", "solution": 5}, "line 2: `solution` must be text, got int"),
    ({"problem": "x", "answer": "4", "id": 1.5}, "line 2: `id` must be text, got float"),
    ({"question": "x", "answer": "4 apples\n#### 4"}, "worked solution"),
    (published("", "4", 0), "line 2: `prompt\\[0\\].content` is empty"),
    ({**published("x", "4", 0), "prompt": "x"}, "exactly one user message, got str"),
    ({**published("x", "4", 0), "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}]}, "exactly one user message"),
    ({**published("x", "4", 0), "reward_model": {}}, "`reward_model.ground_truth` is missing"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ProblemDataError, match=f"p.jsonl.*{message}"):
        load_problems([write_jsonl(tmp_path / "p.jsonl", GOOD, row)])


def test_bad_parquet_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProblemDataError, match="p.parquet, row 2: `answer` is missing"):
        load_problems([write_parquet(tmp_path / "p.parquet", GOOD, {**GOOD, "id": "h", "answer": None})])


def test_repeated_id_names_both_places(tmp_path: Path) -> None:
    first, second = write_jsonl(tmp_path / "a.jsonl", GOOD), write_jsonl(tmp_path / "b.jsonl", {**GOOD, "id": "other"}, GOOD)
    with pytest.raises(ProblemDataError, match=r"b\.jsonl, line 2: id 'g' was already used at .*a\.jsonl, line 1"):
        load_problems([first, second])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ProblemDataError, match="none.jsonl: no such file"):
        load_problems([tmp_path / "none.jsonl"])
    with pytest.raises(ProblemDataError, match=r"unknown extension '\.csv'; expected one of \.jsonl, \.parquet"):
        load_problems([write_jsonl(tmp_path / "p.csv", GOOD)])
    with pytest.raises(ProblemDataError, match="no usable problem"):
        load_problems([write_jsonl(tmp_path / "empty.jsonl", "")])
    with pytest.raises(ProblemDataError, match="not a readable Parquet file"):
        load_problems([write_jsonl(tmp_path / "text.parquet", GOOD)])
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(ProblemDataError, match="not UTF-8"):
        load_problems([tmp_path / "latin.jsonl"])
    with pytest.raises(ProblemDataError, match="no data files"):
        load_problems([])
    with pytest.raises(TypeError, match="sequence of paths"):
        load_problems("p.jsonl")
