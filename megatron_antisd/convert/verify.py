"""Reading both sides of a conversion back and comparing them, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.rows import EntryRows
from megatron_antisd.convert.stored_tensors import StoredTensors
from megatron_antisd.durable import file_sha256
from megatron_antisd.models.huggingface import HuggingfaceCheckpoint, same_bytes

Advance = Callable[[int], None]


class Difference(ConvertError):
    """The output is not what was to be written."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What was found equal."""

    tensors: int = 0
    """Hugging Face tensors."""
    nbytes: int = 0
    difference: str = ""
    """What was not."""

    def __add__(self, other: Compared) -> Compared:
        return Compared(tensors=self.tensors + other.tensors, nbytes=self.nbytes + other.nbytes, difference=self.difference or other.difference)


def compare(entries: Iterable[EntryRows], hf: HuggingfaceCheckpoint, stored: StoredTensors, dtype: torch.dtype | None, advance: Advance) -> Compared:
    """Hold the Hugging Face tensors against the checkpoint's, cast to `dtype` (None: as they are). Raises Difference."""
    tensors = nbytes = 0
    for rows in entries:
        for name, runs in zip(rows.entry.huggingface, rows.destinations(), strict=True):
            target = dtype or stored.dtype(rows.entry.name)
            if hf.dtype(name) != target:
                raise Difference(f"verification: {name} has dtype {hf.dtype(name)}, expected {target}")
            row = 0
            for run in runs:
                for piece in stored.slices(rows.entry.name, run.first, run.count):
                    theirs = hf.rows(name, row, len(piece))
                    if not same_bytes(piece.to(target), theirs):
                        raise Difference(f"verification: {name} differs in rows {row} to {row + len(piece) - 1}; the output is thrown away")
                    row += len(piece)
                    advance(theirs.nbytes)
            tensors, nbytes = tensors + 1, nbytes + hf.tensors[name].nbytes
    return Compared(tensors=tensors, nbytes=nbytes)


def check_checksums(directory: Path, expected: Mapping[str, str]) -> None:
    """Raises Difference for a file whose bytes are others than when it was written."""
    for name, checksum in expected.items():
        if (found := file_sha256(directory / name)) != checksum:
            raise Difference(f"{directory / name} is damaged: its SHA-256 is {found}, the manifest says {checksum}")
