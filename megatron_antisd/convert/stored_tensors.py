"""The tensors of a checkpoint's `tensors/` without torch.distributed.checkpoint's planner, which reads every rectangle it touches into memory:
rows as views of the files where one rectangle holds them, gathered slice by slice where several do. And the files' other side, writing."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_antisd.convert.part_file import PartFile
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.models.huggingface import OPEN_FILES
from megatron_antisd.models.mapped_file import MappedFile
from megatron_antisd.models.weight_map import Shape

SLICE_BYTES = 16 << 20
_LOCAL_HEADER = 30
_KEPT = 32  # places of rectangles; those of one tensor are asked for again and again


class StoredTensors:
    """Global tensors by name. Raises ConvertError where the metadata cannot be read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            metadata = FileSystemReader(directory).read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise ConvertError(f"{directory / '.metadata'} cannot be read ({type(error).__name__}: {error}); the checkpoint is damaged") from error
        self._tensors: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata
        self._places: Mapping[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._mapped, self._piece = lru_cache(OPEN_FILES)(MappedFile), lru_cache(_KEPT)(self._find_piece)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def is_whole(self, name: str) -> bool:
        """Whether its rectangles, which never overlap, are all there."""
        stored = self._tensors[name]
        return sum(math.prod(chunk.sizes) for chunk in stored.chunks) == math.prod(stored.size)

    def slices(self, name: str, first: int, count: int) -> Iterator[torch.Tensor]:
        """Rows [first, first + count) as matrices [rows, columns] of at most `SLICE_BYTES` (or one row)."""
        columns = math.prod(self._tensors[name].size[1:])
        step = max(1, SLICE_BYTES // (columns * self.dtype(name).itemsize))
        pieces = self._pieces(name, first, count)
        for start in range(first, first + count, step):
            yield self._rows(pieces, start, min(step, first + count - start), columns, self.dtype(name))

    def _pieces(self, name: str, first: int, count: int) -> list[tuple[int, int, torch.Tensor]]:
        """(top row, left column, matrix) of every rectangle that reaches into these rows."""
        found = []
        for number, chunk in enumerate(self._tensors[name].chunks):
            top, left = (*chunk.offsets, 0)[:2]
            height, width = (*chunk.sizes, 1)[:2]
            if top < first + count and top + height > first:
                found.append((top, left, self._piece(name, number).view(height, width)))
        return found

    @staticmethod
    def _rows(pieces: Sequence[tuple[int, int, torch.Tensor]], first: int, count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        for top, _, piece in pieces:
            if piece.shape[1] == columns and top <= first and first + count <= top + piece.shape[0]:
                return piece[first - top : first - top + count]
        rows = torch.empty(count, columns, dtype=dtype)
        for top, left, piece in pieces:
            start, stop = max(first, top), min(first + count, top + piece.shape[0])
            if start < stop:
                rows[start - first : stop - first, left : left + piece.shape[1]] = piece[start - top : stop - top]
        return rows

    def _find_piece(self, name: str, number: int) -> torch.Tensor:
        """A view of the file: torch.save stores a tensor's bytes as they are, as a member of a zip archive."""
        chunk = self._tensors[name].chunks[number]
        place = self._places[MetadataIndex(name, chunk.offsets)]
        path = self.directory / place.relative_path
        file = self._mapped(path)
        try:
            with zipfile.ZipFile(_Window(file.bytes(place.offset, place.length))) as archive:
                (member,) = (each for each in archive.infolist() if each.filename.endswith("/data/0"))
            lengths = struct.unpack("<26x2H", file.bytes(place.offset + member.header_offset, _LOCAL_HEADER))
        except (zipfile.BadZipFile, ValueError, struct.error) as error:
            raise ConvertError(f"{path} is damaged: {name} at byte {place.offset} cannot be read ({type(error).__name__}: {error})") from error
        dtype = self.dtype(name)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != math.prod(chunk.sizes) * dtype.itemsize:
            raise ConvertError(f"{path} is damaged: {name} at byte {place.offset} has {member.file_size} bytes, expected those of "
                               f"{list(chunk.sizes)} {dtype}")
        return file.tensor(dtype, tuple(chunk.sizes), place.offset + member.header_offset + _LOCAL_HEADER + sum(lengths))


class _Window(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if (0, self._at, len(self._data))[whence] + offset < 0:
            raise ValueError(f"position {offset} is before the beginning")
        self._at = (0, self._at, len(self._data))[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        taken = self._data[self._at : self._at + len(buffer)]
        buffer[: len(taken)] = taken
        self._at += len(taken)
        return len(taken)


def store(file: PartFile, pieces: Iterable[tuple[Sequence[int], torch.Tensor]], shape: Shape) -> dict[str, Any]:
    """Write the rectangles of one tensor, (offset, piece with a storage of its own); what `metadata` needs to know of them."""
    rows, dtype = [], None
    for offset, piece in pieces:
        start, dtype = file.tell(), piece.dtype
        torch.save(piece, file)
        rows.append([list(offset), list(piece.shape), start, file.tell() - start])
    return {"shape": list(shape), "dtype": dtype_name(dtype), "pieces": rows}


@contextmanager
def without_crc() -> Iterator[None]:
    """torch.save leaves its slow checksums out; nothing that reads with torch looks at them, and the manifest has better ones."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def metadata(records: Sequence[Mapping[str, Any]], folder: str) -> bytes:
    """The `.metadata` of all parts, for torch.distributed.checkpoint's FileSystemReader of `folder`."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for record in records:
        path = record["file"].removeprefix(folder + "/")
        for name, stored in record["tensors"].items():
            chunks = []
            for offset, sizes, start, length in stored["pieces"]:
                chunks.append(ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(sizes)))
                places[MetadataIndex(name, offset)] = _StorageInfo(path, start, length)
            properties = TensorProperties(dtype=getattr(torch, stored["dtype"]))
            tensors[name] = TensorStorageMetadata(properties=properties, size=torch.Size(stored["shape"]), chunks=chunks)
    return pickle.dumps(Metadata(state_dict_metadata=tensors, storage_data=places, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION))
