"""Every sample of an evaluation on disk: `evaluations/step_000010/<benchmark>.jsonl`.

The first line, the header, says what the samples are of: benchmark, problems, sampling, seed, policy. Then one sample a line, problem by
problem. What `append` returned from survives a crash; a problem that a crash cut short is sampled again. Samples whose header differs
from what is asked for now are moved aside, never mixed in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_antisd.durable import append_whole, write_whole
from megatron_antisd.evaluation.statistics import GradedSample
from megatron_antisd.metrics.files import EVALUATIONS, json_line
from megatron_antisd.records import CORRECT_REWARD

_log = logging.getLogger(__name__)

SAMPLE_KEYS = {"problem_id", "index", "reward", "feedback", "truncated", "tokens", "answer", "text"}
DIGESTED_BYTES = 1 << 16
"""At each end of a file of weights."""


class StoreError(ValueError):
    """A file of samples cannot be used; the message names the line and what to do."""


class SampleStore:
    """The samples of one benchmark at one step. `header` is what they must be of; for one rank alone."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, patient: bool = False) -> None:
        """`patient`: where samples cannot be written (a full disk), they are kept for this process alone; otherwise OSError is raised."""
        self.path, self._patient = path, patient
        self._header = json.loads(json.dumps(header))
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if path.is_file():
            self._open_existing()
        else:
            self._write_all()

    def complete(self, problem_id: str) -> bool:
        return problem_id in self._rows

    def append(self, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Problem id -> its samples, all of them, in the order of their index."""
        for problem_id, samples in rows.items():
            self._check(problem_id, samples)
        self._write(lambda: append_whole(self.path, b"".join(json_line(sample) for samples in rows.values() for sample in samples)))
        self._rows |= {problem_id: [dict(sample) for sample in samples] for problem_id, samples in rows.items()}

    def rows(self, problem_id: str) -> list[dict[str, Any]]:
        return self._rows[problem_id]

    def _check(self, problem_id: str, samples: Sequence[Mapping[str, Any]]) -> None:
        indices = [sample.get("index") for sample in samples]
        if indices != list(range(self._header["samples"])) or any(set(sample) != SAMPLE_KEYS for sample in samples):
            keys = sorted({key for sample in samples for key in sample})
            raise StoreError(f"{self.path}: problem {problem_id!r} has samples {indices} with keys {keys}, expected 0..{self._header['samples'] - 1} "
                             f"with {sorted(SAMPLE_KEYS)}")

    def _open_existing(self) -> None:
        header, rows, cut_off = _read(self.path)
        if header != self._header:
            old = _aside(self.path)
            changed = sorted(key for key in {*header, *self._header} if header.get(key) != self._header.get(key))
            _log.warning("%s holds samples of another evaluation (%s differ); moved to %s", self.path, ", ".join(changed), old.name)
            self._write_all()
            return
        found = by_problem(rows)
        self._rows = {problem_id: samples for problem_id, samples in found.items() if len(samples) == header["samples"]}
        for problem_id, samples in self._rows.items():
            self._check(problem_id, samples)
        if self._rows:
            _log.info("%s: continuing with the samples of %d problems", self.path, len(self._rows))
        if cut_off or len(self._rows) < len(found):
            self._write_all()

    def _write_all(self) -> None:
        self._write(lambda: write_samples(self.path, self._header, [sample for samples in self._rows.values() for sample in samples]))

    def _write(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self._patient:
                raise
            _log.error("%s could not be written: %s; the evaluation goes on", self.path, error)


def write_samples(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of samples anew, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, map(json_line, (header, *rows)))


def by_problem(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Problem id -> its samples, in the order of the rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["problem_id"], []).append(row)
    return found


def graded_sample(row: Mapping[str, Any]) -> GradedSample:
    """A stored sample as the summary takes it: correct is a reward of at least CORRECT_REWARD."""
    return GradedSample(correct=row["reward"] >= CORRECT_REWARD, truncated=row["truncated"], tokens=row["tokens"], answer=row["answer"])


def weights_name(path: Path) -> str:
    """Names a directory's weights by their content: a digest of the files' names, sizes, beginnings and ends. A copy has the same name; reading
    60 GB whole would take longer than many an evaluation."""
    digest = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), *path.glob("tensors/*"), *path.glob("manifest.json")]):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size}\n".encode())
        with file.open("rb") as content:
            digest.update(content.read(DIGESTED_BYTES))
            content.seek(max(0, size - DIGESTED_BYTES))
            digest.update(content.read(DIGESTED_BYTES))
    return f"weights {digest.hexdigest()[:16]}"


def store_path(directory: Path, step: int, benchmark: str) -> Path:
    return directory / EVALUATIONS / f"step_{step:06d}" / f"{benchmark}.jsonl"


def read_samples(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, samples). Raises FileNotFoundError, or StoreError for a broken line; a last line cut off by a crash is left out."""
    header, rows, _ = _read(path)
    return header, rows


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], bool]:
    *lines, tail = path.read_bytes().split(b"\n")
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, expected an object")
            if number > 1 and set(row) != SAMPLE_KEYS:
                raise ValueError(f"keys {sorted(row)}, expected {sorted(SAMPLE_KEYS)}")
            parsed.append(row)
        except ValueError as error:
            kind = "header" if number == 1 else "sample"
            raise StoreError(f"{path} line {number} is no {kind} ({error}); repair it or move the file away") from error
    if not parsed:
        raise StoreError(f"{path} has no header; move the file away")
    return parsed[0], parsed[1:], bool(tail)


def _aside(path: Path) -> Path:
    number = 1
    while (old := path.with_name(f"{path.stem}.old-{number}.jsonl")).exists():
        number += 1
    return path.rename(old)
