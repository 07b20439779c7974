"""A copy of tensors in host memory, which a writer may take its time over."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_antisd.parallel.global_tensors import GlobalTensor


class HostCopies:
    """Keeps its memory from one snapshot to the next: as many bytes as this rank's share of a checkpoint, pinned where a GPU's is copied."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def take(self, tensors: Mapping[str, GlobalTensor]) -> dict[str, GlobalTensor]:
        """The same tensors over copies of their memory, complete when this returns."""
        taken, on_gpu = {}, False
        for name, tensor in tensors.items():
            pieces = {}
            for offset, piece in tensor.pieces.items():
                pieces[offset] = self._buffer((name, offset), piece).copy_(piece, non_blocking=True)
                on_gpu |= piece.is_cuda
            taken[name] = GlobalTensor(shape=tensor.shape, pieces=pieces)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return taken

    def _buffer(self, key: tuple[str, torch.Size], piece: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
            buffer = self._buffers[key] = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
        return buffer
