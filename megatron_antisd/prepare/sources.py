"""Rows of a published data set: a local file or folder, or a name on Hugging Face."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_antisd.durable import file_sha256

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".parquet")


class PrepareError(ValueError):
    """The data cannot be prepared; the message says what is wrong and what to do."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows come from, for the manifest."""

    name: str
    """The path or the name on Hugging Face, with subset and split where they matter."""
    sha256: str | None
    """Of a local file; a data set on Hugging Face is named by its own fingerprint instead."""


def open_source(source: str, subset: str | None, split: str | None) -> tuple[Source, Iterator[Mapping[str, Any]]]:
    """(where from, rows). A path that exists is read here; anything else is a name on Hugging Face, read by its `datasets` library (a local
    folder too). Raises PrepareError."""
    path = Path(source)
    if path.is_file():
        return Source(name=str(path), sha256=file_sha256(path)), _read_file(path)
    if path.suffix in {".gz", *FILE_KINDS}:
        raise PrepareError(f"{source}: no such file (taken from {Path.cwd()})")
    return _open_dataset(source, subset, split)


def _read_file(path: Path) -> Iterator[Mapping[str, Any]]:
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    if path.name.endswith(".json"):
        return _read_list(path)
    raise PrepareError(f"{path}: unknown kind of file; expected one of {', '.join(FILE_KINDS)}")


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    """Batch by batch: DAPO-Math-17k's file repeats its rows about a hundred times."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=8192):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise PrepareError(f"{path}: not a readable Parquet file ({error})") from error


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    opened = gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")
    with opened as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _row(line, f"{path}, line {number}")


def _read_list(path: Path) -> Iterator[Mapping[str, Any]]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise PrepareError(f"{path}: holds a {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise PrepareError(f"{path}, item {number}: holds a {type(row).__name__}, expected an object")
        yield row


def _row(line: bytes, place: str) -> Mapping[str, Any]:
    row = _parse(line, place)
    if not isinstance(row, dict):
        raise PrepareError(f"{place}: holds a {type(row).__name__}, expected an object")
    return row


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # UnicodeDecodeError among them
        raise PrepareError(f"{place}: not JSON in UTF-8 ({error}): {text[:80]!r}") from error


def _open_dataset(name: str, subset: str | None, split: str | None) -> tuple[Source, Iterator[Mapping[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # no network, no such name, no such split
        raise PrepareError(f"{name}: Hugging Face's `datasets` could not load it ({type(error).__name__}: {error}). Without network, give a "
                           "local file instead: --from FILE") from error
    if isinstance(loaded, datasets.DatasetDict):
        raise PrepareError(f"{name} has the splits {sorted(loaded)}; name one with --split")
    label = f"{name}{f', {subset}' if subset else ''}, {split}, fingerprint {loaded._fingerprint}"
    return Source(name=label, sha256=None), iter(loaded)
