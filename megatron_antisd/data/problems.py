"""JSON lines / Parquet -> Problem, and which problems come next.

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

`ProblemSampler` is deterministic, endless and resumable at any point. Its randomness is a hash of (seed, epoch, problem id)
rather than a library's generator: the same on every machine, version and rank, without a stream whose state must be saved.
"""

from __future__ import annotations

import dataclasses
import decimal
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_antisd.records import CodeTests, Problem, code_tests_from_json

logger = logging.getLogger(__name__)

TEXT_KEYS = ("problem", "question", "prompt")
DAPO_BEFORE = re.compile(
    r"\ASolve the following math problem step by step\. The last line of your response should be of the form Answer: [^\n]*\n\n"
)
DAPO_AFTER = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.\s*\Z")


class ProblemDataError(ValueError):
    """A data file cannot be used; the message holds file, row, reason and what was expected."""


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
    published = _PublishedRows()
    for number, row in read(path):
        place = f"{path}, {unit} {number}"
        if not isinstance(row, dict):
            raise ProblemDataError(f"{place}: holds a {type(row).__name__}, expected a JSON object such as "
                                   '{"id": "p1", "problem": "2+2?", "answer": "4"}')
        if not isinstance(row.get("reward_model"), dict):
            collected.append((place, _plain(row, place, f"{path.name}:{number}")))
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
            used = {"id", "answer", "solution", "source", "tests", "reward_model", "extra_info", "data_source", *TEXT_KEYS}
            columns = [name for name in file.schema_arrow.names if name in used]
            number = 0
            for batch in file.iter_batches(batch_size=8192, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as error:
        raise ProblemDataError(f"{path}: not a readable Parquet file ({error})") from error


def _plain(row: Mapping[str, Any], place: str, default_id: str) -> Problem:
    """A row of the schemas `problem`, `question` and `prompt`."""
    key = next((k for k in TEXT_KEYS if row.get(k) is not None), None)
    if key is None:
        raise ProblemDataError(f"{place}: no problem text; expected one of the keys {', '.join(TEXT_KEYS)}, got {sorted(row)}")
    tests = _tests(row, place)
    answer = _answer(row.get("answer"), place, "answer") if tests is None else ""
    if "\n#### " in answer:
        raise ProblemDataError(f"{place}: `answer` is a worked solution ending in '####' (GSM8K's format); put the final value "
                               "into `answer` and the text into `solution`")
    return Problem(id=_identifier(row.get("id"), place, default_id), prompt=_text(row[key], place, key), answer=answer, tests=tests,
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


class _PublishedRows:
    """Rows of the `verl` schema in one file: drops copies, remembers texts with contradicting answers."""

    def __init__(self) -> None:
        self._answers: dict[str, set[str]] = {}
        self._places: dict[str, list[str]] = {}
        self._copies = 0
        self._unwrapped = 0

    def take(self, row: Mapping[str, Any], place: str, default_id: str) -> Problem | None:
        """The row's problem; None for a copy of an earlier row."""
        published = _user_message(row.get("prompt"), place)
        answer = _answer(row["reward_model"].get("ground_truth"), place, "reward_model.ground_truth")
        text = _without_instruction(published)
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


def _without_instruction(text: str) -> str:
    """DAPO's instruction around the problem taken off, where both halves are there."""
    before, after = DAPO_BEFORE.search(text), DAPO_AFTER.search(text)
    if before is None or after is None or before.end() >= after.start():
        return text
    return text[before.end():after.start()].strip()


def _user_message(messages: Any, place: str) -> str:
    if not isinstance(messages, list) or [m.get("role") if isinstance(m, dict) else m for m in messages] != ["user"]:
        got = [m.get("role") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else type(messages).__name__
        raise ProblemDataError(f"{place}: `prompt` must hold exactly one user message, got {got}; "
                               "a system prompt belongs into data.system_prompt")
    return _text(messages[0].get("content"), place, "prompt[0].content")


def _text(value: Any, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise ProblemDataError(f"{place}: `{key}` must be text, got {type(value).__name__} {value!r:.80}")
    if not value.strip():
        raise ProblemDataError(f"{place}: `{key}` is empty")
    return value.strip()


def _optional_text(value: Any, place: str, key: str) -> str | None:
    """Blank text counts as absent."""
    return None if value is None or value == "" or (isinstance(value, str) and not value.strip()) else _text(value, place, key)


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
    return _text(value, place, key)


def _identifier(value: Any, place: str, default: str) -> str:
    if value is None:
        return default
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, place, "id")


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash of the parts, the same in every process (Python's `hash` is not)."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def fingerprint(problems: Sequence[Problem]) -> str:
    """Of ids, texts, answers and solutions, in order: two data sets with one fingerprint are the same data set."""
    digest = hashlib.sha256()
    for problem in problems:
        tests = None if problem.tests is None else json.dumps(dataclasses.asdict(problem.tests))
        for part in (problem.id, problem.prompt, problem.answer, problem.solution, *(() if tests is None else (tests,))):
            digest.update(b"\x00" if part is None else b"\x01%d:" % len(part.encode()) + part.encode())
    return digest.hexdigest()


class ProblemSampler:
    """Batches of `per_step` problems over endless epochs, each epoch a permutation of its own from (seed, epoch).

    A batch at an epoch's end takes what is left and goes on with the next epoch, where problems it already holds wait until
    after the batch: nothing is skipped, and no problem is twice in a batch. `shuffle=False` keeps the order of the files.
    Raises ProblemDataError when there are fewer problems than `per_step`.
    """

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int, shuffle: bool = True) -> None:
        if per_step < 1:
            raise ValueError(f"per_step must be at least 1, got {per_step}")
        if len(problems) < per_step:
            raise ProblemDataError(f"the data set has {len(problems)} problems, a step needs {per_step}; add data or lower "
                                   f"rollout.problems_per_step to at most {len(problems)}")
        if len({problem.id for problem in problems}) != len(problems):
            raise ValueError("problem ids repeat; load_problems checks that they are unique")
        self._problems = tuple(problems)
        self._per_step, self._seed, self._shuffle = per_step, seed, shuffle
        self._fingerprint = fingerprint(problems)
        self._restart()

    def next(self) -> list[Problem]:
        """The next `per_step` problems, all different."""
        batch = self._order[self._position:self._position + self._per_step]
        self._position += len(batch)
        missing = self._per_step - len(batch)
        if missing:
            self._start_epoch(self._epoch + 1, tail=batch)
            batch = batch + self._order[:missing]
            self._position = missing
        return [self._problems[index] for index in batch]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; `position` counts the problems of `epoch` that were handed out."""
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint,
                "seed": self._seed, "per_step": self._per_step, "shuffle": self._shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError for another data set or a state that cannot be."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"the sampler's state lacks {missing}; it holds {sorted(state)}")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(f"the sampler's state belongs to another data set (fingerprint {state['fingerprint'][:12]}..., this one has "
                             f"{self._fingerprint[:12]}...): resume with the same data.train files, or start a new run")
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= len(self._problems):
            raise ValueError(f"the sampler's state is impossible: epoch {epoch}, position {position} of {len(self._problems)} problems")
        for name in ("seed", "per_step", "shuffle"):
            if state[name] != self.state_dict()[name]:
                logger.warning("the data position was saved with %s=%s and continues with %s=%s: some problems of this epoch may "
                               "come twice or not at all", name, state[name], name, self.state_dict()[name])
        # An epoch's order depends on the batch that straddles its beginning, so it follows from the orders before it.
        self._restart()
        while self._epoch < epoch:
            straddling = (self._epoch + 1) * len(self._problems) % self._per_step
            self._start_epoch(self._epoch + 1, tail=self._order[len(self._order) - straddling:])
        self._position = position

    def _restart(self) -> None:
        self._epoch = 0
        self._start_epoch(0, tail=[])

    def _start_epoch(self, epoch: int, tail: list[int]) -> None:
        """Set the order of `epoch`; `tail`: indices already in the batch that the epoch's first problems complete."""
        order = list(range(len(self._problems)))
        if self._shuffle:
            order.sort(key=lambda index: stable_hash("order", self._seed, epoch, self._problems[index].id))
        if tail:
            held = set(tail)
            head = [index for index in order if index not in held][:self._per_step - len(tail)]
            taken = set(head)
            order = head + [index for index in order if index not in taken]
        self._epoch, self._order, self._position = epoch, order, 0
