"""JSON lines / Parquet -> Problem.

`load_problems` checks every row before a run starts; an error names file, row and reason.

Accepted rows (columns of a Parquet file, keys of a JSON object; other keys are ignored). The first schema that fits is taken:

    schema    problem                 answer                       solution    id                                source
    verl      prompt: one message     reward_model.ground_truth    -           data_source-extra_info.index      data_source
    problem   problem: text           answer: text or number       solution?   id?: text or integer              source?
    code      problem: text           tests: records.CodeTests     solution?   id?                               source?
    question  question: text          answer                       solution?   id?                               source?
    prompt    prompt: text            answer                       solution?   id?                               source?

`verl` is how DAPO-Math-17k is published: 17,917 rows, which the file on Hugging Face repeats about 100 times, and around each problem
an instruction to end on "Answer: ...", which contradicts a grader of boxed answers. Copies are dropped; the instruction is taken
off (what the student is told stands in `data.prompt_template`); a text that occurs with different answers is dropped altogether,
since at least one answer is wrong. All three are counted in the log. A row without an id gets `<file name>:<row>`; rows count from 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_antisd.data.rows import COLUMNS, ProblemDataError, PublishedRows, plain_problem
from megatron_antisd.records import Problem

logger = logging.getLogger(__name__)


def load_problems(paths: Sequence[str | Path]) -> list[Problem]:
    """Read every file, in order. Raises ProblemDataError on the first bad row, on a repeated id and on a file without problems."""
    if isinstance(paths, str | Path):
        raise TypeError(f"load_problems expects a sequence of paths, got the single path {str(paths)!r}; put it in a list")
    if not paths:
        raise ProblemDataError("no data files were given; list at least one .jsonl or .parquet file")
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for path in map(Path, paths):
        for place, problem in _load_file(path):
            if problem.id in places:
                raise ProblemDataError(f"{place}: id {problem.id!r} was already used at {places[problem.id]}; ids must be unique "
                                       "over all files (is a file listed twice, or do two files without ids share a name?)")
            places[problem.id] = place
            problems.append(problem)
    return problems


def _load_file(path: Path) -> list[tuple[str, Problem]]:
    """(place, problem) of every usable row of one file."""
    readers: dict[str, tuple[Callable[[Path], Iterator[tuple[int, Any]]], str]] = {
        ".jsonl": (_read_json_lines, "line"), ".parquet": (_read_parquet, "row"),
    }
    if path.suffix not in readers:
        raise ProblemDataError(f"{path}: unknown extension {path.suffix!r}; expected one of {', '.join(readers)}")
    if not path.is_file():
        raise ProblemDataError(f"{path}: no such file")
    read, unit = readers[path.suffix]
    collected: list[tuple[str, Problem]] = []
    published = PublishedRows()
    for number, row in read(path):
        place = f"{path}, {unit} {number}"
        if not isinstance(row, dict):
            raise ProblemDataError(f"{place}: holds a {type(row).__name__}, expected a JSON object such as "
                                   '{"id": "p1", "problem": "2+2?", "answer": "4"}')
        if not isinstance(row.get("reward_model"), dict):
            collected.append((place, plain_problem(row, place, f"{path.name}:{number}")))
        elif (problem := published.take(row, place, f"{path.name}:{number}")) is not None:
            collected.append((place, problem))
    collected = published.without_contradictions(collected, path)
    if not collected:
        raise ProblemDataError(f"{path}: the file holds no usable problem")
    logger.info("%s: %d problems", path, len(collected))
    return collected


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, parsed value); blank lines are skipped. Splits at newlines only: a text may hold U+2028."""
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ProblemDataError(f"{path}, line {number}: malformed JSON ({error.msg} at column {error.colno}): "
                                               f"{line.strip()[:80]!r}; expected one JSON object a line") from error
        except UnicodeDecodeError as error:
            raise ProblemDataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number, row as a dict), in batches: DAPO-Math-17k's file repeats its 17,917 rows about 100 times. Other columns are not read."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            number = 0
            for batch in file.iter_batches(batch_size=8192, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise ProblemDataError(f"{path}: not a readable Parquet file ({error})") from error


def fingerprint(problems: Sequence[Problem]) -> str:
    """Of ids, texts, answers and solutions, in order: two data sets with one fingerprint are the same data set."""
    digest = hashlib.sha256()
    for problem in problems:
        tests = None if problem.tests is None else json.dumps(dataclasses.asdict(problem.tests))
        for part in (problem.id, problem.prompt, problem.answer, problem.solution, *(() if tests is None else (tests,))):
            digest.update(b"\x00" if part is None else b"\x01%d:" % len(part.encode()) + part.encode())
    return digest.hexdigest()
