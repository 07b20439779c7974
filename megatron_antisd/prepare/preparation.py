"""Rows in; our JSON lines, a manifest and counts of what was dropped out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_antisd.data.rows import ProblemDataError, required_text
from megatron_antisd.durable import file_sha256, write_whole
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.metrics.files import json_line
from megatron_antisd.prepare.code import CodeRowError, code_problem, is_code_row
from megatron_antisd.prepare.decontamination import Decontamination
from megatron_antisd.prepare.schemas import Dropped, identifier_of, read_row
from megatron_antisd.prepare.sources import PrepareError, Source
from megatron_antisd.records import Problem

MANIFEST_SUFFIX = ".manifest.json"
COPY, CONTRADICTION, BAD_TESTS = "copy of an earlier row", "same problem with different answers", "tests that cannot be read"
EXAMPLES = 3

Settings = Callable[[], SandboxSettings]
"""Chooses a sandbox, when the first programming task asks for one."""


@dataclass(kw_only=True)
class Prepared:
    """Problems that are kept, in the order of their rows, and counts of the others."""

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Of each reason the first few."""

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append(example)


def prepare_rows(rows: Iterable[Mapping[str, Any]], *, name: str, columns: Mapping[str, str], decontamination: Decontamination | None,
                 sandbox: Settings, progress: Callable[[int], None] = lambda count: None) -> Prepared:
    """Read, drop copies, contradictions and what is contaminated. A broken row is dropped and counted, never guessed at."""
    prepared = Prepared()
    answers: dict[tuple[str, ...], set[str]] = {}
    firsts: list[tuple[tuple[str, ...], Problem]] = []
    identifiers: set[str] = set()
    for number, row in enumerate(rows, start=1):
        prepared.rows = number
        progress(number)
        try:
            problem = _code_problem(row, name, number, sandbox) if is_code_row(row) else read_row(row, columns, name, number)
        except Dropped as dropped:
            prepared.drop(dropped.reason, str(dropped))
            continue
        # Texts are the same when their words and signs are: white space tells no problems apart.
        key, answer = (*problem.prompt.split(),), problem.answer or repr(problem.tests)
        known = answers.setdefault(key, set())
        if answer in known:
            prepared.drop(COPY, f"row {number} ({problem.id})")
            continue
        known.add(answer)
        if problem.id in identifiers:
            problem = dataclasses.replace(problem, id=f"{problem.id}-row{number}")
        identifiers.add(problem.id)
        firsts.append((key, problem))
    for key, problem in firsts:
        match = decontamination.match(problem.prompt) if decontamination is not None else None
        if len(answers[key]) > 1:
            prepared.drop(CONTRADICTION, f"{problem.id}: {' '.join(key)[:80]!r}")
        elif match is not None:
            prepared.drop(f"contaminated by {match[0]}", f"{problem.id} repeats {match[1]}")
        else:
            prepared.problems.append(problem)
    return prepared


def _code_problem(row: Mapping[str, Any], name: str, number: int, sandbox: Settings) -> Problem:
    try:
        prompt, tests = code_problem(row, sandbox())
        return Problem(id=identifier_of(row, name, number), prompt=required_text(prompt, f"row {number}", "prompt"), answer="", tests=tests,
                       solution=None, source=str(row.get("source") or row.get("data_source") or ""))
    except (CodeRowError, ProblemDataError, ValueError, TypeError, KeyError, AttributeError) as error:  # a row of any shape may come
        raise Dropped(BAD_TESTS, f"row {number}: {error}") from error


def write_prepared(prepared: Prepared, output: Path, *, source: Source, options: Mapping[str, Any], against: Mapping[str, Path]) -> dict[str, Any]:
    """Write `output` and `output.manifest.json`, each whole or not at all; returns the manifest. Raises PrepareError where nothing is left."""
    if not prepared.problems:
        raise PrepareError(f"{source.name}: none of {prepared.rows} rows is left; dropped: {dict(prepared.dropped)}; the first: {prepared.examples}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, (json_line(_row(problem)) for problem in prepared.problems))
    manifest = {
        "source": dataclasses.asdict(source), "options": dict(options), "rows": prepared.rows, "problems": len(prepared.problems),
        "dropped": dict(prepared.dropped), "examples": prepared.examples,
        "decontaminated_against": {name: {"path": str(path), "sha256": file_sha256(path)} for name, path in against.items()},
        "sha256": file_sha256(output),
    }
    write_whole(manifest_path(output), [(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")])
    return manifest


def verify(output: Path) -> dict[str, Any]:
    """The manifest of a prepared file. Raises PrepareError where file and manifest do not belong together."""
    path = manifest_path(output)
    if not output.is_file() or not path.is_file():
        raise PrepareError(f"{output}: no prepared file, or no {path.name} beside it; prepare it anew")
    manifest = json.loads(path.read_text())
    found = file_sha256(output)
    if manifest["sha256"] != found:
        raise PrepareError(f"{output} has SHA-256 {found}, its manifest {manifest['sha256']}: it was changed since; prepare it anew")
    return manifest


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + MANIFEST_SUFFIX)


def _row(problem: Problem) -> dict[str, Any]:
    row: dict[str, Any] = {"id": problem.id, "problem": problem.prompt}
    row |= {"answer": problem.answer} if problem.tests is None else {"tests": dataclasses.asdict(problem.tests)}
    return row | {key: value for key, value in (("solution", problem.solution), ("source", problem.source)) if value}
