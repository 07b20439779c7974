"""Who sends which bytes to whom in a weight sync: computed once, from where the weights stand on both sides.

Every engine rank gets its own slices and nothing else, from ranks that hold them: itself if it is in a trainer's process, else one of its
node, else any; those that hold the same share the sending, in turns. A part is bounded for each engine rank and for each sender, over all that it
feeds. Modules that fit into a part come whole, larger ones tensor by tensor, larger tensors by rows. Pipeline stages send at the same time, block
by block, for as many modules at once as `UNDER_WAY` allows.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_antisd.models.description import ModelDescription
from megatron_antisd.models.weight_map import Entry
from megatron_antisd.parallel.placement import EngineLayout, TrainerPlace, held_pieces, module_of, needed_box
from megatron_antisd.wire.boxes import Box
from megatron_antisd.wire.instructions import LOCAL, Incoming, IncomingPiece, IncomingTensor, Outgoing, OutgoingPiece, Source, aligned

UNDER_WAY = 4
"""Parts that the modules may take together of which an engine rank has some and not all: vLLM keeps what it got of them."""
Costs = Counter[tuple[str, int]]
"""Bytes of each place in a replica, ("place", number), and of each trainer rank that sends, ("rank", number), to all whom it feeds."""


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
    """For each place in a replica; None where it takes nothing, an empty box where all that it takes is padding."""
    holdings: tuple[Holding, ...]
    turn: int
    """Among the tensors that the same ranks hold: whose turn it is to send."""
    cut: tuple[Box | None, ...] | None = None
    """Where this is some rows of a tensor: all that each place needs of it."""
    last: bool = True
    """Of the rows of a tensor."""


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
        self._receivers: dict[tuple[tuple[int, ...], int], Counter[tuple[int, ...]]] = {}
        stages = [list(stage) for stage in _planned_stages(description, places, engine, dtypes)]
        self.tensors = {tensor.name: tensor for stage in stages for module in stage for tensor in module}
        self.parts = self._parts(stages, part_bytes)

    def moves(self, part: int, engine_rank: int, only: int | None = None) -> Iterator[Move]:
        """Of one part to one engine rank, in the order in which they stand in messages. `only`: those that this trainer rank may send."""
        for tensor in self.parts[part]:
            yield from self._moves(tensor, engine_rank, only)

    def _moves(self, tensor: PlannedTensor, engine_rank: int, only: int | None = None) -> Iterator[Move]:
        need, own = tensor.needs[engine_rank % self.engine.tensor_size], engine_rank if self.inside else None
        if need is None:
            return
        for number, holding in enumerate(tensor.holdings):
            if only is not None and only not in holding.ranks:
                continue
            box = need.overlap(holding.box)
            if box is not None:
                local = own in holding.ranks
                yield Move(tensor, box, holding, LOCAL if local else self._sender(holding.ranks, engine_rank, tensor.turn + number))

    def outgoing(self, rank: int) -> list[tuple[Outgoing, ...]]:
        """What a trainer rank sends, part by part."""
        return [tuple(message for engine_rank in range(self.engine_ranks) if (message := self._message(part, rank, engine_rank)) is not None)
                for part in range(len(self.parts))]

    def incoming(self, engine_rank: int) -> list[Incoming]:
        """What an engine rank receives, part by part."""
        return [self._incoming(part, engine_rank) for part in range(len(self.parts))]

    # -- parts

    def _parts(self, stages: Sequence[Sequence[list[PlannedTensor]]], part_bytes: int) -> list[list[PlannedTensor]]:
        cut = [[(self._kept(module), self._blocks(module, part_bytes)) for module in stage] for stage in stages]
        parts: list[list[PlannedTensor]] = []
        filled = Costs()
        for block in _by_turns(cut, UNDER_WAY * part_bytes):
            costs = self._costs(block)
            if not parts or any(filled[key] + value > part_bytes for key, value in costs.items()):
                parts.append([])
                filled = Costs()
            parts[-1] += block
            filled.update(costs)
        return parts

    def _blocks(self, module: list[PlannedTensor], part_bytes: int) -> list[list[PlannedTensor]]:
        """What never lies in two parts: the module, else its tensors, else rows of those."""
        if max(self._costs(module).values()) <= part_bytes:
            return [module]
        return [[piece] for tensor in module for piece in self._by_rows(tensor, part_bytes)]

    def _by_rows(self, tensor: PlannedTensor, part_bytes: int) -> list[PlannedTensor]:
        """In as few powers of two as fit into parts; single rows where not even those do."""
        most = max(need.rows for need in tensor.needs if need is not None)
        count, pieces = 1, [tensor]
        while count < most and any(max(self._costs([piece]).values()) > part_bytes for piece in pieces):
            count = min(most, 2 * count)
            pieces = [replace(tensor, turn=tensor.turn + number, cut=tensor.needs, last=number == count - 1,
                              needs=tuple(need and need.band(number, count) for need in tensor.needs)) for number in range(count)]
        return pieces

    def _costs(self, tensors: Sequence[PlannedTensor]) -> Costs:
        costs = Costs()
        for tensor in tensors:
            for place, need in enumerate(tensor.needs):
                if need is None:
                    continue
                costs["place", place] += aligned(need.numel * tensor.itemsize)
                for number, holding in enumerate(tensor.holdings):
                    box = need.overlap(holding.box)
                    for rank, messages in self._loads(holding.ranks, place, tensor.turn + number) if box is not None else ():
                        costs["rank", rank] += aligned(box.numel * tensor.itemsize) * messages
        return costs

    def _kept(self, module: Sequence[PlannedTensor]) -> int:
        """Bytes that an engine rank has of a module when it has all of it."""
        return max(sum(need.numel * tensor.itemsize for tensor in module if (need := tensor.needs[place]) is not None)
                   for place in range(self.engine.tensor_size))

    # -- senders

    def _loads(self, ranks: tuple[int, ...], place: int, number: int) -> Iterator[tuple[int, int]]:
        """(rank, messages): how often `_sender` says each of `ranks` for the engine ranks of a place."""
        key = (ranks, place)
        if key not in self._receivers:
            self._receivers[key] = Counter(near for engine_rank, (near, _) in self._rotation(*key).items()
                                           if not (self.inside and engine_rank in ranks))
        for near, receivers in self._receivers[key].items():
            each, more = divmod(receivers, len(near))
            for turn in range(len(near) if each else more):
                yield near[(turn + number) % len(near)], each + (turn < more)

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
        for tensor in self.parts[part]:
            need = tensor.needs[place]
            if need is None:
                continue
            pieces = []
            for move in self._moves(tensor, engine_rank):
                source, held, local = move.holding.source, move.holding.box, move.sender == LOCAL
                where = Source(source.key, source.row + move.box.top - held.top, source.column + move.box.left - held.left)
                pieces.append(IncomingPiece(move.box, move.sender, 0 if local else sizes[move.sender], where if local else None))
                if not local:
                    sizes[move.sender] += aligned(move.box.numel * tensor.itemsize)
            if sum(piece.box.numel for piece in pieces) != need.numel:
                raise RuntimeError(f"{tensor.name}: the trainer's ranks hold {sum(p.box.numel for p in pieces)} elements of the {need} that "
                                   f"engine rank {engine_rank} needs")
            whole = need if tensor.cut is None else tensor.cut[place] or need
            tensors.append(IncomingTensor(tensor.name, tensor.shape, tensor.dtype, whole, tuple(pieces), last=tensor.last))
        return Incoming(tuple(tensors), dict(sizes))  # a tensor has no piece where all is padding


def _planned_stages(description: ModelDescription, places: Sequence[TrainerPlace], engine: EngineLayout,
                    dtypes: Mapping[str, tuple[str, int]]) -> Iterator[Iterator[list[PlannedTensor]]]:
    """The modules of each pipeline stage."""
    holders = _holders(places, description.experts)
    turns: Counter[tuple[int, ...]] = Counter()
    for stage in _stages(description, places):
        yield ([tensor for entry in module for tensor in _planned_tensors(description, places, engine, dtypes, holders, entry, turns)]
               for module in stage)


def _planned_tensors(description: ModelDescription, places: Sequence[TrainerPlace], engine: EngineLayout, dtypes: Mapping[str, tuple[str, int]],
                     holders: Mapping[tuple[str, int | None, int | None], list[int]], entry: Entry,
                     turns: Counter[tuple[int, ...]]) -> Iterator[PlannedTensor]:
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
        owners = holdings[0].ranks if holdings else ()
        yield PlannedTensor(
            name=name, shape=tuple(shape), dtype=dtype, itemsize=itemsize, holdings=tuple(holdings), turn=turns[owners],
            needs=tuple(needed_box(entry, name, place, engine, description) for place in range(engine.tensor_size)))
        turns[owners] += 1


def _holders(places: Sequence[TrainerPlace], experts: int | None) -> Mapping[tuple[str, int | None, int | None], list[int]]:
    """(name, layer, block of experts or None) -> ranks."""
    found: dict[tuple[str, int | None, int | None], list[int]] = defaultdict(list)
    for rank, place in enumerate(places):
        for name, layer in place.held:
            found[name, layer, place.expert_rank if experts and "{expert}" in name else None].append(rank)
    return found


def _expert_block(entry: Entry, place: TrainerPlace, experts: int | None) -> int | None:
    return None if entry.expert is None else entry.expert // ((experts or 1) // place.expert_size)


def _stages(description: ModelDescription, places: Sequence[TrainerPlace]) -> list[list[list[Entry]]]:
    """The parameters of each pipeline stage, module by module in the order of the layers."""
    stage_of: dict[tuple[str, int | None], int] = {}
    for place in places:
        for key in place.held:
            stage_of[key] = min(place.stage, stage_of.get(key, place.stage))
    stages: dict[int, list[list[Entry]]] = defaultdict(list)
    for _, module in itertools.groupby(description.entries(), key=module_of):
        entries = list(module)
        if entries[0].expert is not None:  # one of each expert-parallel rank by turns, so that all of them send in each part
            share = (description.experts or 1) // places[0].expert_size
            entries.sort(key=lambda entry: ((entry.expert or 0) % share, entry.weight.megatron, (entry.expert or 0) // share))
        stages[stage_of[entries[0].weight.megatron, entries[0].layer]].append(entries)
    return [stages[stage] for stage in sorted(stages)]


def _by_turns(stages: Sequence[Sequence[tuple[int, list[list[PlannedTensor]]]]], room: int) -> Iterator[list[PlannedTensor]]:
    """A block of each stage, the next one of each, and so on. `stages`: for each module the bytes that an engine rank keeps of it until it is
    complete, and its blocks. A stage waits while the modules of several blocks that are under way leave no room for another one."""
    left = [list(reversed(stage)) for stage in stages]
    begun: dict[int, list[list[PlannedTensor]]] = {}
    kept: dict[int, int] = {}
    while begun or any(left):
        for stage, modules in enumerate(left):
            if stage not in begun:
                if not modules:
                    continue
                size, blocks = modules[-1]
                if len(blocks) > 1 and kept and sum(kept.values()) + size > room:
                    continue
                modules.pop()
                begun[stage] = blocks[::-1]
                if len(blocks) > 1:
                    kept[stage] = size
            yield begun[stage].pop()
            if not begun[stage]:
                del begun[stage]
                kept.pop(stage, None)
