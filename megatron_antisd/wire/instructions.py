"""What one rank is told about a transfer: what it sends in each part, and what it receives. Plain data that travels as JSON.

A transfer is a list of parts. In each part a sender has at most one message for a receiver: the pieces that this one needs from it, one behind
another, each at a multiple of ALIGNMENT bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_antisd.wire.boxes import Box

ALIGNMENT = 16
LOCAL = -1
"""Instead of a sender: what this process holds itself."""

Key = tuple[str, int | None, int | None]
"""A parameter of the sender: (name in the table of weights, layer, expert), numbers in the whole model."""


def aligned(size: int) -> int:
    """Bytes, rounded up."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Source:
    """Where a piece stands at its sender: first element at (row, column) of the parameter `key`."""

    key: Key
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class OutgoingPiece:
    source: Source
    rows: int
    columns: int
    offset: int
    """Byte in the message."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message."""

    receiver: int
    """Engine rank."""
    size: int
    """Bytes."""
    pieces: tuple[OutgoingPiece, ...]


@dataclass(frozen=True, slots=True)
class IncomingPiece:
    box: Box
    sender: int
    """Trainer rank, or LOCAL."""
    offset: int
    """Byte in the sender's message."""
    source: Source | None = None
    """Of a local piece."""


@dataclass(frozen=True, slots=True)
class IncomingTensor:
    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: str
    box: Box
    """What is needed of it."""
    pieces: tuple[IncomingPiece, ...]
    last: bool = True
    """False: further rows of the box come in later parts."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """One part."""

    tensors: tuple[IncomingTensor, ...]
    sizes: dict[int, int]
    """Sender -> bytes of its message."""


def incoming_to_json(parts: Sequence[Incoming]) -> str:
    """Without local pieces: those are for a receiver in the sender's own process, which needs no letter."""
    return json.dumps([
        {"sizes": list(part.sizes.items()),
         "tensors": [[t.name, t.shape, t.dtype, _numbers(t.box), [[_numbers(p.box), p.sender, p.offset] for p in t.pieces], t.last]
                     for t in part.tensors]}
        for part in parts], separators=(",", ":"))


def incoming_from_json(text: str) -> list[Incoming]:
    return [Incoming(tensors=tuple(_tensor(row) for row in part["tensors"]), sizes={int(sender): size for sender, size in part["sizes"]})
            for part in json.loads(text)]


def digest(text: str) -> str:
    """A name for instructions that both sides have."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tensor(row: list[Any]) -> IncomingTensor:
    name, shape, dtype, box, pieces, last = row
    return IncomingTensor(name, tuple(shape), dtype, Box(*box), tuple(IncomingPiece(Box(*b), sender, offset) for b, sender, offset in pieces), last)


def _numbers(box: Box) -> list[int]:
    return [box.top, box.bottom, box.left, box.right]
