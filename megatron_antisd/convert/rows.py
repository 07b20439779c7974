"""Which rows of which tensor stand where. Splitting and merging are told by the weight map itself, run over row numbers instead of weights, so a
tensor can be converted in slices; a vector counts as a matrix of one column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_antisd.models.weight_map import Entry, Geometry, Layout, Shape, merge, split


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows [first, first + count) of one tensor."""

    tensor: int
    """Place among the entry's Hugging Face tensors; 0 in the one Megatron tensor."""
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class EntryRows:
    """One parameter as a global Megatron tensor and as Hugging Face tensors. `geometry` is that of one rank: without padding."""

    entry: Entry
    geometry: Geometry

    @property
    def columns(self) -> int:
        shape = next(iter(self.entry.huggingface.values()))
        return shape[1] if len(shape) == 2 else 1

    @property
    def shape(self) -> Shape:
        """Of the global Megatron tensor."""
        shapes = list(self.entry.huggingface.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def _bounds(self) -> list[int]:
        bounds = [0]
        for shape in self.entry.huggingface.values():
            bounds.append(bounds[-1] + shape[0])
        return bounds

    @cached_property
    def _order(self) -> torch.Tensor | None:
        """Row of the Hugging Face tensors, stacked, for each row of the Megatron tensor; None where they are the same."""
        if self.entry.weight.layout is not Layout.QKV:
            return None
        bounds = self._bounds
        numbers = [torch.arange(first, last)[:, None] for first, last in zip(bounds, bounds[1:], strict=False)]
        return split(self.entry.weight.layout, numbers, 0, 1, self.geometry).view(-1)

    def sources(self, first: int, count: int) -> Iterator[Run]:
        """Where rows of the Megatron tensor come from, in order."""
        rows = [(first, count)] if self._order is None else consecutive(self._order[first : first + count])
        for start, length in rows:
            for tensor, (lower, upper) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
                inside = min(start + length, upper) - max(start, lower)
                if inside > 0:
                    yield Run(tensor=tensor, first=max(start, lower) - lower, count=inside)

    def destinations(self) -> list[list[Run]]:
        """For each Hugging Face tensor the rows of the Megatron tensor that it is made of, in order."""
        number = torch.arange(self.shape[0])[:, None]
        return [[Run(tensor=0, first=first, count=count) for first, count in consecutive(rows.view(-1))]
                for rows in merge(self.entry.weight.layout, [number if len(self.shape) == 2 else number.view(-1)], self.geometry)]


def consecutive(numbers: torch.Tensor) -> list[tuple[int, int]]:
    """Rising runs: (first, count)."""
    breaks = (numbers.diff() != 1).nonzero().view(-1) + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return [(int(numbers[start]), stop - start) for start, stop in zip(edges, edges[1:], strict=False)]
