"""Tensors that are views of a file: nothing is read before it is used, and the system may drop what was read again."""

from __future__ import annotations

import mmap
import warnings
from pathlib import Path

import torch


class MappedFile:
    """A file in memory, for reading alone: writing into one of its tensors ends the process. (A private writable map would be counted against
    the machine's memory, and larger files be refused.)"""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> torch.Tensor:
        """The tensor whose bytes begin at `start`. Its storage is these bytes alone; they may stand at an odd address."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=torch.Size(shape).numel(), offset=start).view(shape)

    def bytes(self, start: int, count: int) -> memoryview:
        return memoryview(self._map)[start : start + count]
