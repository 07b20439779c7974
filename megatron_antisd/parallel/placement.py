"""Where weights stand, on both sides of a sync: which part of which Hugging Face tensor a trainer rank holds, and which part an engine rank needs.
Pure: no process groups, so that layouts of any size can be planned anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_antisd.models.description import ModelDescription
from megatron_antisd.models.weight_map import Entry, Layout, Weight
from megatron_antisd.wire.boxes import Box

VLLM_VOCAB_MULTIPLE = 64
"""vLLM pads the vocabulary to this multiple before it divides it."""


@dataclass(frozen=True, kw_only=True)
class TrainerPlace:
    """One rank of the trainer, as far as its weights are concerned."""

    held: frozenset[tuple[str, int | None]]
    """(name in the table of weights, layer) of what this rank holds a shard of, experts aside from their numbers."""
    stage: int
    tensor_rank: int
    tensor_size: int
    expert_rank: int = 0
    expert_size: int = 1
    expert_tensor_rank: int = 0
    expert_tensor_size: int = 1
    node: int = 0

    def divided(self, weight: Weight) -> tuple[int, int]:
        """(rank, size) among the ranks over which a weight is divided."""
        return (self.expert_tensor_rank, self.expert_tensor_size) if weight.expert else (self.tensor_rank, self.tensor_size)

    def holds(self, entry: Entry, experts: int | None) -> bool:
        """Whether it has a shard of this parameter of the whole model."""
        if (entry.weight.megatron, entry.layer) not in self.held:
            return False
        return entry.expert is None or entry.expert // ((experts or 1) // self.expert_size) == self.expert_rank


@dataclass(frozen=True, kw_only=True)
class EngineLayout:
    """How vLLM divides a model over the ranks of one replica."""

    tensor_size: int
    expert_parallel: bool = False
    """Each rank has whole experts instead of a slice of every one."""


@dataclass(frozen=True, slots=True)
class HeldPiece:
    """Elements `box` of a Hugging Face tensor stand at (row, column) and following of a Megatron shard."""

    box: Box
    row: int
    column: int = 0


def held_pieces(entry: Entry, rank: int, size: int, description: ModelDescription) -> Iterator[tuple[str, list[HeldPiece]]]:
    """Of each Hugging Face tensor in the parameter `entry`, what the shard `rank` of `size` holds. Padding of the vocabulary is no part of any."""
    layout, geometry = entry.weight.layout, description.geometry
    if layout is Layout.QKV:
        yield from _interleaved(entry, rank, size, description)
        return
    row = 0
    for name, shape in entry.huggingface.items():
        whole = Box.whole(shape)
        if layout is Layout.REPLICATED:
            box = whole
        elif layout is Layout.ROW:
            width = whole.columns // size
            box = Box(0, whole.rows, rank * width, (rank + 1) * width)
        else:
            height = (geometry.padded_vocab_size if layout is Layout.VOCAB else whole.rows) // size
            box = Box(rank * height, min((rank + 1) * height, whole.rows), 0, whole.columns)
        yield name, [HeldPiece(box, row)] if box.rows > 0 else []
        row += box.rows


def _interleaved(entry: Entry, rank: int, size: int, description: ModelDescription) -> Iterator[tuple[str, list[HeldPiece]]]:
    """q, k and v of each query group stand together."""
    groups = description.geometry.groups
    heights = [shape[0] // groups for shape in entry.huggingface.values()]
    stride, mine = sum(heights), groups // size
    begin = 0
    for (name, shape), height in zip(entry.huggingface.items(), heights, strict=True):
        yield name, [HeldPiece(Box((rank * mine + group) * height, (rank * mine + group + 1) * height, 0, shape[1]), group * stride + begin)
                     for group in range(mine)]
        begin += height


def needed_box(entry: Entry, name: str, place: int, engine: EngineLayout, description: ModelDescription) -> Box | None:
    """What vLLM's rank `place` of a replica takes of the tensor `name`; None for another rank's expert. Norms are whole on every rank, those
    over all heads of OLMo-3 too."""
    shape, size = entry.huggingface[name], engine.tensor_size
    whole, layout = Box.whole(shape), entry.weight.layout
    if entry.weight.expert and engine.expert_parallel:
        share = (description.experts or 1) // size
        return whole if entry.expert is not None and entry.expert // share == place else None
    if layout in (Layout.REPLICATED, Layout.COLUMN):
        return whole
    if layout is Layout.ROW:
        width = whole.columns // size
        return Box(0, whole.rows, place * width, (place + 1) * width)
    if layout is Layout.VOCAB:
        height = -(-whole.rows // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE // size
        box = Box(min(place * height, whole.rows), min((place + 1) * height, whole.rows), 0, whole.columns)
        return box
    parts = size
    if layout is Layout.QKV and list(entry.huggingface).index(name) > 0:  # fewer key/value heads than ranks: neighbours hold the same one
        parts = min(size, description.geometry.groups)
    height, part = whole.rows // parts, place * parts // size
    return Box(part * height, (part + 1) * height, 0, whole.columns)


def module_of(entry: Entry) -> tuple[int | None, str]:
    """What vLLM loads as one: it keeps what it got of a module until it has all of it."""
    return entry.layer, "experts" if entry.weight.expert else entry.weight.megatron


def planned_places(description: ModelDescription, *, tensor: int = 1, pipeline: int = 1, expert: int = 1, expert_tensor: int | None = None,
                   data: int = 1, ranks_a_node: int = 8) -> list[TrainerPlace]:
    """The ranks of a layout in Megatron's order (tensor fastest, then data, then pipeline) with layers divided evenly: for planning without a run."""
    expert_tensor = tensor if expert_tensor is None else expert_tensor
    held = stage_weights(description, pipeline)
    places = []
    for stage in range(pipeline):
        for number in range(data * tensor):
            places.append(TrainerPlace(
                held=held[stage], stage=stage, tensor_rank=number % tensor, tensor_size=tensor, expert_rank=number // expert_tensor % expert,
                expert_size=expert, expert_tensor_rank=number % expert_tensor, expert_tensor_size=expert_tensor,
                node=(stage * data * tensor + number) // ranks_a_node))
    return places


def stage_weights(description: ModelDescription, pipeline: int) -> Sequence[frozenset[tuple[str, int | None]]]:
    """What each of `pipeline` equal stages holds; a tied embedding is on the first and the last."""
    layers, found = description.layers // pipeline, [set[tuple[str, int | None]]() for _ in range(pipeline)]
    before = True
    for entry in description.entries():
        key = (entry.weight.megatron, entry.layer)
        before = before and entry.layer is None
        found[entry.layer // layers if entry.layer is not None else 0 if before else pipeline - 1].add(key)
    if description.tied:
        found[-1].add((description.embedding().weight.megatron, None))
    return [frozenset(keys) for keys in found]
