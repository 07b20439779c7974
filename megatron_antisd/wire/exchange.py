"""Runs a transfer's parts: the next one is on its way while this one is used. What a rank holds beside its own weights are two parts that it
receives, one that it sends, and tensors of which some rows are here and others come later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_antisd.wire.boxes import Box, HeldPart
from megatron_antisd.wire.instructions import LOCAL, Incoming, IncomingTensor, Key, Outgoing, Source
from megatron_antisd.wire.transports import Pending, TransferError, Transport


@dataclass(frozen=True, kw_only=True)
class Script:
    """One rank's side of a transfer. Trainer and engine ranks have numbers of their own; the two functions give those of the transport."""

    parts: int
    outgoing: Sequence[Sequence[Outgoing]] = ()
    """For each part; empty for a rank that sends nothing at all."""
    incoming: Sequence[Incoming] = ()
    number_of_trainer: Callable[[int], int]
    number_of_engine: Callable[[int], int]
    parameter: Callable[[Key], torch.Tensor] | None = None
    """This rank's own, for what it sends or keeps."""
    device: torch.device
    timeout: float
    """Seconds for one part."""


class _Flight:
    def __init__(self, pending: Pending, received: dict[int, torch.Tensor], sent: list[torch.Tensor]) -> None:
        self.pending, self.received, self.sent = pending, received, sent


def run(script: Script, transport: Transport) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what this rank receives, a HeldPart where that is not the whole tensor. Read it to its end: others wait for what this rank
    sends meanwhile. Tensors stay as they are for as long as they are referred to. Raises TransferError."""
    unfinished: dict[str, torch.Tensor] = {}
    flight = _start(script, transport, 0)
    for number in range(script.parts):
        try:
            flight.pending.wait(script.timeout)
        except TransferError as error:
            raise TransferError(f"part {number + 1} of {script.parts}: {error}") from error
        flight.sent.clear()  # before the next part is packed: one part that is sent at a time
        following = _start(script, transport, number + 1) if number + 1 < script.parts else None
        if script.incoming:
            for tensor in script.incoming[number].tensors:
                matrix = _assemble(script, tensor, flight.received, unfinished)
                if tensor.last:
                    yield tensor.name, _as_tensor(tensor, matrix)
        flight = following


def _start(script: Script, transport: Transport, number: int) -> _Flight:
    sends = {script.number_of_engine(message.receiver): _pack(script, message) for message in (script.outgoing[number] if script.outgoing else ())}
    sizes = script.incoming[number].sizes if script.incoming else {}
    received = {sender: torch.empty(size, dtype=torch.uint8, device=script.device) for sender, size in sizes.items()}
    pending = transport.exchange(sends, {script.number_of_trainer(sender): buffer for sender, buffer in received.items()})
    return _Flight(pending, received, list(sends.values()))


@torch.no_grad()
def _pack(script: Script, message: Outgoing) -> torch.Tensor:
    flat = torch.empty(message.size, dtype=torch.uint8, device=script.device)
    for piece in message.pieces:
        values = _cut(script, piece.source, piece.rows, piece.columns)
        _typed(flat, piece.offset, values.dtype, piece.rows, piece.columns).copy_(values)
    return flat


def _assemble(script: Script, tensor: IncomingTensor, received: dict[int, torch.Tensor], unfinished: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor's box, as a view of the message where one piece is all of it. Of a tensor whose rows come in several parts what there is so far,
    which `unfinished` keeps until its last part."""
    dtype = getattr(torch, tensor.dtype)
    pieces = [(piece.box, _cut(script, piece.source, piece.box.rows, piece.box.columns) if piece.sender == LOCAL and piece.source is not None
               else _typed(received[piece.sender], piece.offset, dtype, piece.box.rows, piece.box.columns)) for piece in tensor.pieces]
    if len(pieces) == 1 and pieces[0][0] == tensor.box:
        return pieces[0][1]
    matrix = unfinished.pop(tensor.name, None)
    if matrix is None:
        matrix = torch.empty(tensor.box.rows, tensor.box.columns, dtype=dtype, device=script.device)
    for box, values in pieces:
        tensor.box.cut(matrix, box).copy_(values)
    if not tensor.last:
        unfinished[tensor.name] = matrix
    return matrix


def _as_tensor(tensor: IncomingTensor, matrix: torch.Tensor) -> torch.Tensor:
    return matrix.reshape(tensor.shape) if tensor.box == Box.whole(tensor.shape) else HeldPart(matrix, tensor.box, tensor.shape)


def _cut(script: Script, source: Source, rows: int, columns: int) -> torch.Tensor:
    """View of a piece in this rank's parameter."""
    if script.parameter is None:
        raise RuntimeError("this rank has no parameters to send from")
    parameter = script.parameter(source.key).detach()
    matrix = parameter if parameter.dim() == 2 else parameter[:, None]
    return matrix[source.row : source.row + rows, source.column : source.column + columns]


def _typed(flat: torch.Tensor, offset: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    return flat[offset : offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
