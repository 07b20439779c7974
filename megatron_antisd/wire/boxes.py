"""Rectangles of a tensor: which part of it someone holds, needs or sends. A vector is a matrix of one column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass(frozen=True, slots=True)
class Box:
    """Rows [top, bottom) and columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Self:
        """All of a tensor of one or two dimensions."""
        return cls(0, shape[0], 0, math.prod(shape[1:]))

    @property
    def rows(self) -> int:
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        return self.right - self.left

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def overlap(self, other: Box) -> Box | None:
        """What both have; None where that is nothing."""
        both = Box(max(self.top, other.top), min(self.bottom, other.bottom), max(self.left, other.left), min(self.right, other.right))
        return both if both.rows > 0 and both.columns > 0 else None

    def holds(self, other: Box) -> bool:
        return self.top <= other.top and other.bottom <= self.bottom and self.left <= other.left and other.right <= self.right

    def band(self, number: int, count: int) -> Box:
        """Band `number` of `count` that its rows are cut into."""
        return Box(self.top + self.rows * number // count, self.top + self.rows * (number + 1) // count, self.left, self.right)

    def cut(self, matrix: torch.Tensor, inner: Box) -> torch.Tensor:
        """View of `inner`'s elements in `matrix`, which has this box's."""
        return matrix[inner.top - self.top : inner.bottom - self.top, inner.left - self.left : inner.right - self.left]


class HeldPart(torch.Tensor):
    """Stands for a whole tensor of which only a box is here: it has the whole one's shape and no memory of its own, and `narrow` into the box
    gives that box's elements. Anything else raises, so that what was not sent is never read. A loader that takes its slice
    out of a full tensor is none the wiser."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, part: torch.Tensor, box: Box, shape: Sequence[int]) -> HeldPart:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=part.dtype, device=part.device)

    def __init__(self, part: torch.Tensor, box: Box, shape: Sequence[int]) -> None:
        """`part` [rows, columns] of `box` in a tensor of `shape`."""
        self._part, self._box = part, box

    def held(self) -> tuple[torch.Tensor, Box]:
        """The part and its place."""
        return self._part, self._box

    def __repr__(self) -> str:
        return f"HeldPart({self._box} of {tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        whole = next((value for value in args if isinstance(value, HeldPart)), None)
        if whole is None or whole is not args[0]:
            raise RuntimeError(f"{func} reads a tensor of which only a part was sent: the loader was expected to narrow it first")
        if func is torch.ops.aten.detach.default:
            return HeldPart(whole._part, whole._box, whole.shape)
        if func is torch.ops.aten.unsqueeze.default and args[1] == 0 and whole.dim() == 2:  # one expert as a list of experts, and back
            return HeldPart(whole._part, whole._box, (1, *whole.shape))
        if func is torch.ops.aten.unbind.int and whole.dim() == 3 and (len(args) == 1 or args[1] == 0):
            return [HeldPart(whole._part, whole._box, whole.shape[1:])]
        if func is torch.ops.aten.slice.Tensor and whole.dim() < 3:
            return whole._narrowed(*args[1:])
        raise RuntimeError(f"{func} on a tensor {tuple(whole.shape)} of which only {whole._box} was sent: the loader was expected to narrow it first")

    def _narrowed(self, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> torch.Tensor:
        box, length = Box.whole(self.shape), self.shape[dim]
        first, last = start or 0, length if stop is None else min(stop, length)
        wanted = Box(first, last, box.left, box.right) if dim % self.dim() == 0 else Box(box.top, box.bottom, first, last)
        if step != 1 or not self._box.holds(wanted):
            raise RuntimeError(f"asked for {wanted} (step {step}) of a tensor {tuple(self.shape)} of which {self._box} was sent: the loader divides "
                               "it in another way than the plan of the weight sync assumes")
        found = self._box.cut(self._part, wanted)
        return found if self.dim() == 2 else found[:, 0]
