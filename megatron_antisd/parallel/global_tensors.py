"""One rank's part of a global tensor, as rectangles that torch.distributed.checkpoint writes and reads.

A parameter's shard, or a flat range of it as Megatron's distributed optimizer holds, becomes rectangles of the tensor as it would
be on one rank with an unpadded vocabulary. No communication: pure arithmetic over shapes, and views into the given memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_antisd.models.weight_map import Layout


@dataclass(frozen=True, kw_only=True)
class GlobalTensor:
    """The rectangles of a global tensor that this rank holds. The three methods are the protocol of torch.distributed.checkpoint
    (`_Checkpointable`); ranks that hold the same rectangle write it once."""

    shape: torch.Size
    pieces: dict[torch.Size, torch.Tensor]
    """Offset in the global tensor -> view of the local memory."""

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset), type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offset, sizes=piece.size()),
                    properties=TensorProperties.create_from_tensor(piece), size=self.shape))
            for offset, piece in self.pieces.items()
        ]  # fmt: skip

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=offset, sizes=piece.size()) for offset, piece in self.pieces.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return self.pieces[index.offset]


class SavePlanner(DefaultSavePlanner):
    """The default asks for `torch.Tensor` where it looks pieces up."""

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LoadPlanner(DefaultLoadPlanner):
    """See SavePlanner. The default's set-up, which looks for tensors without memory, takes dataclasses such as ours apart."""

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def place_shard(
    tensor: torch.Tensor, start: int, shape: tuple[int, ...], layout: Layout, rank: int, size: int, vocab_size: int
) -> GlobalTensor:
    """`tensor`: contiguous, the elements of a shard of `shape` (one or two dimensions) from flat position `start` on.
    `rank` of `size`: the shard's place among the tensor-parallel ranks. Padding of the vocabulary is left out."""
    flat = tensor.view(-1)
    rows, columns = shape if len(shape) == 2 else (*shape, 1)
    global_shape, bands = _bands(layout, rows, columns, rank, size, vocab_size)
    pieces: dict[torch.Size, torch.Tensor] = {}
    for top, bottom, left, right in _rectangles(start, start + flat.numel(), columns):
        for band in bands:
            first, last = max(top, band.first), min(bottom, band.last)
            if first >= last:
                continue
            begin = first * columns + left - start
            height, width = last - first, right - left
            offset = (band.global_row + first - band.first, band.global_column + left)
            piece = flat[begin : begin + height * width]
            pieces[torch.Size(offset[: len(shape)])] = piece.view(height, width) if len(shape) == 2 else piece
    return GlobalTensor(shape=torch.Size(global_shape[: len(shape)]), pieces=pieces)


@dataclass(frozen=True, kw_only=True)
class _Band:
    """Rows [first, last) of the shard and where their first element stands in the global tensor."""

    first: int
    last: int
    global_row: int
    global_column: int = 0


def _bands(layout: Layout, rows: int, columns: int, rank: int, size: int, vocab_size: int) -> tuple[tuple[int, int], list[_Band]]:
    """Global shape, and the shard's rows in it."""
    if layout is Layout.REPLICATED:
        return (rows, columns), [_Band(first=0, last=rows, global_row=0)]
    if layout is Layout.ROW:
        return (rows, columns * size), [_Band(first=0, last=rows, global_row=0, global_column=rank * columns)]
    if layout is Layout.VOCAB:
        true_rows = min(max(vocab_size - rank * rows, 0), rows)
        return (vocab_size, columns), [_Band(first=0, last=true_rows, global_row=rank * rows)]
    if layout is Layout.GATED:
        half = rows // 2
        return (rows * size, columns), [_Band(first=0, last=half, global_row=rank * half),
                                        _Band(first=half, last=rows, global_row=half * size + rank * half)]  # fmt: skip
    return (rows * size, columns), [_Band(first=0, last=rows, global_row=rank * rows)]


def _rectangles(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Flat range of a matrix -> (top, bottom, left, right): the rest of a begun row, whole rows, the beginning of a row."""
    if start % columns and start < stop:
        row = start // columns
        end = min(stop, (row + 1) * columns)
        yield row, row + 1, start % columns, end - row * columns
        start = end
    whole = (stop - start) // columns
    if whole:
        yield start // columns, start // columns + whole, 0, columns
        start += whole * columns
    if start < stop:
        yield start // columns, start // columns + 1, 0, stop - start
