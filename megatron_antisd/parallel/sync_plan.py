"""Who sends which bytes to whom in a weight sync: computed once, from where the weights stand on both sides.

Every engine rank gets its own slices and nothing else, from ranks that hold them: itself if it is in a trainer's process, else one of its
node, else any; those that hold the same share the sending, in turns. Parts are cut where vLLM's modules end, in the order of the
layers, with pipeline stages by turns, so that all stages send at the same time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_antisd.models.description import ModelDescription
from megatron_antisd.models.weight_map import Entry
from megatron_antisd.parallel.placement import EngineLayout, TrainerPlace, held_pieces, module_of, needed_box
from megatron_antisd.wire.boxes import Box
from megatron_antisd.wire.instructions import LOCAL, Incoming, IncomingPiece, IncomingTensor, Outgoing, OutgoingPiece, Source, aligned


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """A piece of a Hugging Face tensor and all ranks that have it, at the same place of the same parameter."""

    box: Box
    source: Source
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    needs: tuple[Box | None, ...]
    """For each place in a replica."""
    holdings: tuple[Holding, ...]
    number: int
    """In the order of the plan."""


@dataclass(frozen=True, slots=True)
class Move:
    """One piece on its way to one engine rank; `sender` is a trainer rank or LOCAL."""

    tensor: PlannedTensor
    box: Box
    holding: Holding
    sender: int


class SyncPlan:
    """`places`: the trainer's ranks in order. `dtypes`: name in the table of weights -> (dtype, bytes). Engine rank e is place
    e % `engine.tensor_size` of its replica; with `inside` it lives in the process of trainer rank e, else on node `nodes[e]` (None: one without
    trainer ranks)."""

    def __init__(self, description: ModelDescription, places: Sequence[TrainerPlace], engine: EngineLayout, *, dtypes: Mapping[str, tuple[str, int]],
                 part_bytes: int, engine_ranks: int, inside: bool, nodes: Sequence[int | None] = ()) -> None:
        self.engine, self.engine_ranks, self.inside = engine, engine_ranks, inside
        self._places = places
        self._nodes = [place.node for place in places][:engine_ranks] if inside else list(nodes) or [None] * engine_ranks
        self._turns: dict[tuple[tuple[int, ...], int], dict[int, tuple[tuple[int, ...], int]]] = {}
        tensors = list(_planned_tensors(description, places, engine, dtypes))
        self.parts = _cut_into_parts(tensors, engine.tensor_size, part_bytes)
        self.tensors = {tensor.name: tensor for part in self.parts for tensor in part}

    def moves(self, part: int, engine_rank: int, only: int | None = None) -> Iterator[Move]:
        """Of one part to one engine rank, in the order in which they stand in messages. `only`: those that this trainer rank may send."""
        place, own = engine_rank % self.engine.tensor_size, engine_rank if self.inside else None
        for tensor in self.parts[part]:
            need = tensor.needs[place]
            if need is None:
                continue
            for number, holding in enumerate(tensor.holdings):
                if only is not None and only not in holding.ranks:
                    continue
                box = need.overlap(holding.box)
                if box is not None:
                    local = own in holding.ranks
                    yield Move(tensor, box, holding, LOCAL if local else self._sender(holding.ranks, engine_rank, tensor.number + number))

    def outgoing(self, rank: int) -> list[tuple[Outgoing, ...]]:
        """What a trainer rank sends, part by part."""
        return [tuple(message for engine_rank in range(self.engine_ranks) if (message := self._message(part, rank, engine_rank)) is not None)
                for part in range(len(self.parts))]

    def incoming(self, engine_rank: int) -> list[Incoming]:
        """What an engine rank receives, part by part."""
        return [self._incoming(part, engine_rank) for part in range(len(self.parts))]

    def _sender(self, ranks: tuple[int, ...], engine_rank: int, number: int) -> int:
        """Of those that hold a piece, by turns: the first one for the first engine rank that needs it from others, and so on, beginning with another
        one for each tensor."""
        key = (ranks, engine_rank % self.engine.tensor_size)
        if key not in self._turns:
            self._turns[key] = self._rotation(*key)
        near, turn = self._turns[key][engine_rank]
        return near[(turn + number) % len(near)]

    def _rotation(self, ranks: tuple[int, ...], place: int) -> dict[int, tuple[tuple[int, ...], int]]:
        """For each engine rank of this place: who may send to it, and its number among those with the same senders."""
        found: dict[int, tuple[tuple[int, ...], int]] = {}
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        for engine_rank in range(place, self.engine_ranks, self.engine.tensor_size):
            node = self._nodes[engine_rank]
            near = tuple(rank for rank in ranks if self._places[rank].node == node) or ranks
            found[engine_rank] = near, counts[near]
            counts[near] += not (self.inside and engine_rank in ranks)
        return found

    def _message(self, part: int, rank: int, engine_rank: int) -> Outgoing | None:
        pieces, offset = [], 0
        for move in self.moves(part, engine_rank, only=rank):
            if move.sender == rank:
                source, held = move.holding.source, move.holding.box
                pieces.append(OutgoingPiece(
                    Source(source.key, source.row + move.box.top - held.top, source.column + move.box.left - held.left), move.box.rows,
                    move.box.columns, offset))
                offset += aligned(move.box.numel * move.tensor.itemsize)
        return Outgoing(engine_rank, offset, tuple(pieces)) if pieces else None

    def _incoming(self, part: int, engine_rank: int) -> Incoming:
        sizes: dict[int, int] = defaultdict(int)
        place, tensors = engine_rank % self.engine.tensor_size, []
        moves: dict[int, list[Move]] = defaultdict(list)
        for move in self.moves(part, engine_rank):
            moves[move.tensor.number].append(move)
        for tensor in self.parts[part]:
            need = tensor.needs[place]
            if need is None:
                continue
            pieces = []
            for move in moves[tensor.number]:
                source, held, local = move.holding.source, move.holding.box, move.sender == LOCAL
                where = Source(source.key, source.row + move.box.top - held.top, source.column + move.box.left - held.left)
                pieces.append(IncomingPiece(move.box, move.sender, 0 if local else sizes[move.sender], where if local else None))
                if not local:
                    sizes[move.sender] += aligned(move.box.numel * tensor.itemsize)
            if sum(piece.box.numel for piece in pieces) != need.numel:
                raise RuntimeError(f"{tensor.name}: the trainer's ranks hold {sum(p.box.numel for p in pieces)} elements of the {need} that "
                                   f"engine rank {engine_rank} needs")
            tensors.append(IncomingTensor(tensor.name, tensor.shape, tensor.dtype, need, tuple(pieces)))  # with no piece where all is padding
        return Incoming(tuple(tensors), dict(sizes))


def _planned_tensors(description: ModelDescription, places: Sequence[TrainerPlace], engine: EngineLayout,
                     dtypes: Mapping[str, tuple[str, int]]) -> Iterator[PlannedTensor]:
    holders = _holders(places, description.experts)
    number = 0
    for entry in _stages_by_turns(description, places):
        shards: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank in holders[entry.weight.megatron, entry.layer, _expert_block(entry, places[0], description.experts)]:
            shards[places[rank].divided(entry.weight)].append(rank)
        held: dict[str, list[Holding]] = defaultdict(list)
        key = (entry.weight.megatron, entry.layer, entry.expert)
        for (rank, size), ranks in sorted(shards.items()):
            for name, pieces in held_pieces(entry, rank, size, description):
                held[name] += [Holding(box=p.box, source=Source(key, p.row, p.column), ranks=tuple(ranks)) for p in pieces]
        dtype, itemsize = dtypes[entry.weight.megatron]
        for name, shape in entry.huggingface.items():
            holdings = held[name]
            if holdings and all(h.box == holdings[0].box for h in holdings):  # replicated: every shard is all of it
                holdings = [Holding(box=holdings[0].box, source=holdings[0].source, ranks=tuple(sorted(r for h in holdings for r in h.ranks)))]
            yield PlannedTensor(
                name=name, shape=tuple(shape), dtype=dtype, itemsize=itemsize, holdings=tuple(holdings), number=number,
                needs=tuple(needed_box(entry, name, place, engine, description) for place in range(engine.tensor_size)))
            number += 1


def _holders(places: Sequence[TrainerPlace], experts: int | None) -> Mapping[tuple[str, int | None, int | None], list[int]]:
    """(name, layer, block of experts or None) -> ranks."""
    found: dict[tuple[str, int | None, int | None], list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        for name, layer in place.held:
            found[name, layer, place.expert_rank if experts and "{expert}" in name else None].append(rank)
    return found


def _expert_block(entry: Entry, place: TrainerPlace, experts: int | None) -> int | None:
    return None if entry.expert is None else entry.expert // ((experts or 1) // place.expert_size)


def _stages_by_turns(description: ModelDescription, places: Sequence[TrainerPlace]) -> Iterator[Entry]:
    """Every parameter, module by module: the first module of each stage, the second of each, and so on."""
    stage_of: dict[tuple[str, int | None], int] = {}
    for place in places:
        for key in place.held:
            stage_of[key] = min(place.stage, stage_of.get(key, place.stage))
    stages: dict[int, list[list[Entry]]] = defaultdict(list)
    for _, module in itertools.groupby(description.entries(), key=module_of):
        entries = list(module)
        if entries[0].expert is not None:  # one of each expert-parallel rank by turns, so that all of them send in each part
            share = (description.experts or 1) // places[0].expert_size
            entries.sort(key=lambda entry: ((entry.expert or 0) % share, (entry.expert or 0) // share))
        stages[stage_of[entries[0].weight.megatron, entries[0].layer]].append(entries)
    for turn in itertools.zip_longest(*(stages[stage] for stage in sorted(stages)), fillvalue=()):
        for module_entries in turn:
            yield from module_entries


def _cut_into_parts(tensors: Sequence[PlannedTensor], engine_size: int, part_bytes: int) -> list[list[PlannedTensor]]:
    """Up to `part_bytes` for each engine rank, whole modules where they fit, else tensor by tensor."""
    parts: list[list[PlannedTensor]] = []
    filled = [0] * engine_size

    def cost(tensor: PlannedTensor) -> list[int]:
        return [0 if need is None else aligned(need.numel * tensor.itemsize) for need in tensor.needs]

    def room(extra: Sequence[int]) -> bool:
        return bool(parts) and all(a + b <= part_bytes for a, b in zip(filled, extra, strict=True))

    for _, group in itertools.groupby(tensors, key=_module):
        module = list(group)
        together = [sum(column) for column in zip(*(cost(tensor) for tensor in module), strict=True)]
        blocks = [module] if max(together) <= part_bytes else [[tensor] for tensor in module]
        for number, block in enumerate(blocks):
            extra = [sum(column) for column in zip(*(cost(tensor) for tensor in block), strict=True)]
            if not room(extra) or (len(blocks) > 1 and number == 0):
                parts.append([])
                filled = [0] * engine_size
            parts[-1] += block
            filled = [a + b for a, b in zip(filled, extra, strict=True)]
    return parts


def _module(tensor: PlannedTensor) -> tuple[int | None, str]:
    name, layer, expert = tensor.holdings[0].source.key
    return layer, "experts" if expert is not None else name
