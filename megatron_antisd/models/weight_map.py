"""Names and shapes between Hugging Face and Megatron: pure tensors, no communication, both directions, bitwise.

A family lists its weights as `Weight` rows; `split` makes one rank's Megatron shard from full Hugging Face tensors and `merge`
makes the full Hugging Face tensors from all ranks' shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch


class Layout(Enum):
    """How a Megatron parameter is laid out over tensor-parallel ranks."""

    REPLICATED = "replicated"
    """The same on every rank."""
    COLUMN = "column"
    """Rows (output features) divided."""
    ROW = "row"
    """Columns (input features) divided."""
    VOCAB = "vocab"
    """Rows divided after zero rows were appended up to the padded vocabulary."""
    QKV = "qkv"
    """q, k and v interleaved by query group, groups divided."""
    GATED = "gated"
    """Gate and up projection, each divided by rows, gate above up on every rank."""


Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of a family's table. `{layer}` and `{expert}` are global numbers in the Hugging Face names and in the Megatron name, by which
    checkpoints know it too; `models.transformer_engine` has the names of its layers."""

    megatron: str
    huggingface: dict[str, Shape]
    """Names and full shapes, in the order in which they stand in the Megatron parameter."""
    layout: Layout
    expert: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table filled in for one layer and one expert."""

    weight: Weight
    layer: int | None
    expert: int | None

    @property
    def name(self) -> str:
        """Of the Megatron parameter, in the whole model."""
        return self._fill(self.weight.megatron)

    @property
    def huggingface(self) -> dict[str, Shape]:
        return {self._fill(name): shape for name, shape in self.weight.huggingface.items()}

    def _fill(self, name: str) -> str:
        return name.format(layer=self.layer, expert=self.expert)


def entries(weights: Sequence[Weight], layers: int, experts: int | None) -> Iterator[Entry]:
    """Every parameter of the whole model, in the order of a forward pass: what stands before the layers, layer by layer, what stands behind."""
    where = [number for number, weight in enumerate(weights) if "{layer}" in weight.megatron]
    first, last = where[0], where[-1] + 1
    for weight in weights[:first]:
        yield Entry(weight=weight, layer=None, expert=None)
    for layer in range(layers):
        for weight in weights[first:last]:
            for expert in range(experts) if weight.expert and experts else [None]:
                yield Entry(weight=weight, layer=layer, expert=expert)
    for weight in weights[last:]:
        yield Entry(weight=weight, layer=None, expert=None)


def gated_mlp(ours: str, theirs: str, width: int, hidden: int, *, expert: bool = False) -> list[Weight]:
    """The two rows of a gated MLP under the prefixes `ours` and `theirs`."""
    return [
        Weight(megatron=ours + "linear_fc1.weight", layout=Layout.GATED, expert=expert,
               huggingface={theirs + "gate_proj.weight": (width, hidden), theirs + "up_proj.weight": (width, hidden)}),
        Weight(megatron=ours + "linear_fc2.weight", layout=Layout.ROW, expert=expert, huggingface={theirs + "down_proj.weight": (hidden, width)}),
    ]


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes that splitting and merging need."""

    groups: int
    """Key/value heads of the whole model."""
    head_dim: int
    vocab_size: int
    padded_vocab_size: int


def split(layout: Layout, tensors: Sequence[torch.Tensor], rank: int, size: int, geometry: Geometry) -> torch.Tensor:
    """Full Hugging Face tensors -> this rank's Megatron shard (contiguous)."""
    if layout is Layout.QKV:
        per_group = [t.view(geometry.groups, -1, t.shape[-1]) for t in tensors]
        packed = torch.cat(per_group, dim=1)  # [groups, (heads/groups + 2) * head_dim, hidden]
        return _part(packed, 0, rank, size).reshape(-1, packed.shape[-1]).contiguous()
    if layout is Layout.GATED:
        return torch.cat([_part(t, 0, rank, size) for t in tensors]).contiguous()
    (tensor,) = tensors
    if layout is Layout.REPLICATED:
        return tensor.contiguous()
    if layout is Layout.VOCAB:
        missing = geometry.padded_vocab_size - tensor.shape[0]
        tensor = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor
    return _part(tensor, 1 if layout is Layout.ROW else 0, rank, size).contiguous()


def merge(layout: Layout, shards: Sequence[torch.Tensor], geometry: Geometry) -> tuple[torch.Tensor, ...]:
    """All ranks' shards in rank order -> the full Hugging Face tensors (contiguous)."""
    if layout is Layout.REPLICATED:
        return (shards[0].contiguous(),)
    if layout is Layout.ROW:
        return (torch.cat(list(shards), dim=1),)
    if layout is Layout.GATED:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(torch.cat([half[i] for half in halves]) for i in range(2))
    full = torch.cat(list(shards))
    if layout is Layout.QKV:
        packed = full.view(geometry.groups, -1, full.shape[-1])
        sizes = [packed.shape[1] - 2 * geometry.head_dim, geometry.head_dim, geometry.head_dim]
        return tuple(part.reshape(-1, full.shape[-1]).contiguous() for part in packed.split(sizes, dim=1))
    if layout is Layout.VOCAB:
        return (full[: geometry.vocab_size].contiguous(),)
    return (full,)


def _part(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    if tensor.shape[dim] % size:
        raise ValueError(f"a dimension of {tensor.shape[dim]} cannot be divided over {size} ranks (tensor {tuple(tensor.shape)}, dim {dim})")
    width = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * width, width)
