"""The trainer's end of a weight sync: a stream into the engine of this very process, messages to engine servers, and the checksums that either
must show afterwards.

With servers, for each sync and on every trainer rank:

    sync = sender.prepare(receivers, sync_id="7", version=7)   # on rank 0 it also leaves the plans in the store
    ...                                     # tell every server to receive sync.specs[name] (WeightReceiver.receive_weights)
    failures = sync.send()                  # collective; server -> what went wrong; the others are complete
    problems = sync.mismatches(reports)     # server -> what receive_weights returned, one report an engine rank
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_antisd.models.build import ModelDescription, PolicyModel
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.placement import EngineLayout, TrainerPlace
from megatron_antisd.parallel.reshard import global_expert, local_weights, tied_copy
from megatron_antisd.parallel.sync_plan import SyncPlan
from megatron_antisd.wire.checksums import add, box_checksum
from megatron_antisd.wire.exchange import Script, run
from megatron_antisd.wire.instructions import Incoming, Key, Outgoing, digest, incoming_to_json
from megatron_antisd.wire.transports import Meeting, TrainerGroup, TransferError, members, open_transport

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: multiples of it, of any stride, lie evenly modulo 2^64."""
Checksums = dict[str, dict[int, int]]
"""Tensor -> place in a replica -> checksum of what that rank needs of it."""
PARTS_OF_A_BUCKET = 4
"""A part is loaded while the next one arrives and another one is sent; what is left of `rollout.sync_bucket_bytes` goes to what vLLM keeps of a
module that it has not all of yet."""


@dataclass(frozen=True, kw_only=True)
class ReceiverSpec:
    """One engine server."""

    name: str
    tensor_parallel_size: int
    expert_parallel: bool = False

    @property
    def engine(self) -> EngineLayout:
        return EngineLayout(tensor_size=self.tensor_parallel_size, expert_parallel=self.expert_parallel)


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """One kind of receiver, planned once."""

    plan: SyncPlan
    outgoing: list[tuple[Outgoing, ...]]
    senders: tuple[int, ...]
    """Trainer ranks that send anything."""
    incoming: list[Incoming]
    """Of the engine rank in this process, if there is one."""
    letters: tuple[str, ...]
    """For each place in a server, on rank 0."""
    name: str
    """Of the letters."""


class WeightSender:
    """Planned once for each kind of engine. Every method is collective over the trainer's ranks unless it says otherwise."""

    def __init__(self, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout, *, bucket_bytes: int,
                 transport: str = "process_group", timeout: float = 300.0) -> None:
        """`transport`: to servers, see `wire.transports`. `timeout`: seconds that a peer may take for one part, or to come to a transfer."""
        self._description, self._layout, self._transport, self._timeout = description, layout, transport, timeout
        self._part_bytes = max(1, bucket_bytes // PARTS_OF_A_BUCKET)
        self._parameters: dict[Key, torch.nn.Parameter] = {}
        dtypes: dict[str, tuple[str, int]] = {}
        for sharded, parameter in local_weights(chunks, description, layout):
            self._parameters[sharded.weight.megatron, sharded.layer, global_expert(sharded.local_expert, description, layout)] = parameter
            dtypes[sharded.weight.megatron] = (str(parameter.dtype).removeprefix("torch."), parameter.dtype.itemsize)
        copy = tied_copy(chunks, description, layout)
        if copy is not None:
            self._parameters[description.embedding().weight.megatron, None, None] = copy
        mine = TrainerPlace(
            held=frozenset((name, layer) for name, layer, _ in self._parameters), stage=layout.pipeline_rank, tensor_rank=layout.tensor_rank,
            tensor_size=layout.tensor_size, expert_rank=layout.expert_rank, expert_size=layout.expert_size,
            expert_tensor_rank=layout.expert_tensor_rank, expert_tensor_size=layout.expert_tensor_size, node=_node(layout.rank))
        everyone: list[Any] = [None] * layout.world_size
        dist.all_gather_object(everyone, (mine, dtypes))
        self._places = [place for place, _ in everyone]
        self._dtypes = {name: dtype for _, found in everyone for name, dtype in found.items()}
        self._plans: dict[tuple[EngineLayout, bool], _Planned] = {}
        self._left: set[str] = set()
        """Plans that are in the store."""

    def stream(self, engine: EngineLayout) -> Iterator[tuple[str, torch.Tensor]]:
        """What the engine rank in this process needs (rank r is place r % TP of replica r // TP): (Hugging Face name, tensor), a HeldPart where it
        is a slice. Every rank reads it to its end. Raises TransferError."""
        planned = self._planned(engine, inside=True)
        return run(replace(self._script(planned, number_of_trainer=lambda rank: rank), incoming=planned.incoming), TrainerGroup())

    def expected(self, names: Sequence[str], engine: EngineLayout) -> Checksums:
        """Of these tensors, as the trainer's shards have them now; the same on every rank. Each element is counted by one rank that holds it."""
        planned = self._plans.get((engine, True)) or self._planned(engine, inside=False)
        tensors = planned.plan.tensors
        mine: list[tuple[str, int, int]] = []
        for name in names:
            tensor = tensors[name]
            columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
            for holding in tensor.holdings:
                if holding.ranks[0] != self._layout.rank:
                    continue
                parameter = self._parameters[holding.source.key].detach()
                matrix = parameter if parameter.dim() == 2 else parameter[:, None]
                for place, need in enumerate(tensor.needs):
                    box = need and need.overlap(holding.box)
                    if box:
                        row, column = holding.source.row + box.top - holding.box.top, holding.source.column + box.left - holding.box.left
                        mine.append((name, place, box_checksum(matrix[row : row + box.rows, column : column + box.columns], box, columns)))
        everyone: list[Any] = [None] * self._layout.world_size
        dist.all_gather_object(everyone, mine)
        sums = {name: {place: 0 for place, need in enumerate(tensors[name].needs) if need is not None} for name in names}  # 0: padding alone
        for name, place, value in (row for rows in everyone for row in rows):
            sums[name][place] = add(sums[name][place], value)
        return sums

    def sample(self, number: int, count: int) -> list[str]:
        """`count` tensors for the checksums of sync `number`: every kind of tensor by turns, beginning at a place that numbers of any stride spread
        over all of them. Not collective."""
        kinds: dict[str, list[str]] = defaultdict(list)
        for entry in self._description.entries():
            for template, name in zip(entry.weight.huggingface, entry.huggingface, strict=True):
                kinds[template].append(name)
        order = list(kinds.values())
        period = len(order) * max(map(len, order))
        first = ((number * GOLDEN) % (1 << 64)) * period >> 64  # numbers may be multiples of anything: policy versions are
        turns = range(first, first + min(count, sum(map(len, order))))
        return list(dict.fromkeys(order[turn % len(order)][turn // len(order) % len(order[turn % len(order)])] for turn in turns))

    def prepare(self, receivers: Sequence[ReceiverSpec], *, sync_id: str, version: int, store: dist.Store, address: str,
                checksum_tensors: int = 0) -> ServerSync:
        """One sync with servers. `store` is this rank's handle on the store at `address` (HOST:PORT), where the servers look for it. `sync_id` was
        never used before in it. Not collective, except where a kind of server is new."""
        names = self.sample(version, checksum_tensors)
        specs, planned = {}, {}
        for receiver in receivers:
            kind = planned[receiver.name] = self._planned(receiver.engine, inside=False)
            for place, letter in enumerate(kind.letters if kind.name not in self._left else ()):
                store.set(f"plans/{kind.name}/{place}", letter)
            self._left.add(kind.name)
            specs[receiver.name] = {
                "transport": self._transport, "store": address, "sync": sync_id, "server": receiver.name, "version": version, "plan": kind.name,
                "senders": list(kind.senders), "engine_size": receiver.tensor_parallel_size, "timeout": self._timeout, "checksums": names}
        return ServerSync(self, receivers, specs, planned, store, names)

    # -- plans

    def _planned(self, engine: EngineLayout, *, inside: bool) -> _Planned:
        """`inside`: the engines of the trainer's own processes; else one server."""
        if (engine, inside) not in self._plans:
            plan = SyncPlan(self._description, self._places, engine, dtypes=self._dtypes, part_bytes=self._part_bytes, inside=inside,
                            engine_ranks=self._layout.world_size if inside else engine.tensor_size)
            outgoing = plan.outgoing(self._layout.rank)
            first = not inside and self._layout.rank == 0
            letters = tuple(incoming_to_json(plan.incoming(place)) for place in range(engine.tensor_size)) if first else ()
            everyone: list[Any] = [None] * self._layout.world_size
            dist.all_gather_object(everyone, (any(outgoing), digest("".join(letters))))
            self._plans[engine, inside] = _Planned(
                plan=plan, outgoing=outgoing, senders=tuple(rank for rank, (sends, _) in enumerate(everyone) if sends), name=everyone[0][1],
                incoming=plan.incoming(self._layout.rank) if inside else [], letters=letters)
        return self._plans[engine, inside]

    def _script(self, planned: _Planned, *, number_of_trainer: Callable[[int], int], first_engine: int = 0) -> Script:
        return Script(parts=len(planned.plan.parts), outgoing=planned.outgoing, number_of_trainer=number_of_trainer,
                      number_of_engine=lambda rank: first_engine + rank, parameter=self._parameters.__getitem__, device=self._layout.device,
                      timeout=self._timeout)

    def _send_to(self, receiver: ReceiverSpec, spec: Mapping[str, Any], planned: _Planned, store: dist.Store) -> None:
        """Raises TransferError."""
        senders = planned.senders
        if self._layout.rank not in senders:
            return
        meeting = Meeting(store=dist.PrefixStore(f"syncs/{spec['sync']}/{receiver.name}", store), number=senders.index(self._layout.rank),
                          members=members(senders, receiver.name, receiver.tensor_parallel_size), timeout=self._timeout, device=self._layout.device)
        transport = open_transport(self._transport, meeting)
        try:
            for _ in run(self._script(planned, number_of_trainer=senders.index, first_engine=len(senders)), transport):
                pass
        finally:
            transport.close()


class ServerSync:
    """One sync with servers, see the module."""

    def __init__(self, sender: WeightSender, receivers: Sequence[ReceiverSpec], specs: dict[str, dict[str, Any]], planned: Mapping[str, _Planned],
                 store: dist.Store, names: Sequence[str]) -> None:
        self.specs = specs
        """Server -> the argument of its `receive_weights`; plain JSON."""
        self._sender, self._receivers, self._planned, self._store, self._names = sender, receivers, planned, store, names

    def send(self) -> dict[str, str]:
        """Collective; returns when every server has its weights or was given up: {server: why}, the same on every rank. One server that stalls
        holds no other up."""
        failures: dict[str, str] = {}

        def one(receiver: ReceiverSpec) -> None:
            try:
                # A connection of its own: whoever waits in a store's client holds up all others of that client, and two ranks that wait for each
                # other's word on different servers would do so until their time is up.
                self._sender._send_to(receiver, self.specs[receiver.name], self._planned[receiver.name], self._store.clone())
            except Exception as error:  # whatever it was, the other servers and ranks go on without this one
                failures[receiver.name] = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"

        threads = [threading.Thread(target=one, args=(receiver,), name=f"weights to {receiver.name}") for receiver in self._receivers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        everyone: list[Any] = [None] * self._sender._layout.world_size
        dist.all_gather_object(everyone, failures)
        if self._sender._layout.rank == 0:
            self._forget_meeting_points()
        return {receiver.name: "; ".join(dict.fromkeys(found[receiver.name] for found in everyone if receiver.name in found))
                for receiver in self._receivers if any(receiver.name in found for found in everyone)}

    def _forget_meeting_points(self) -> None:
        """The store would keep every process group's keys for ever."""
        prefixes = {f"syncs/{spec['sync']}/" for spec in self.specs.values()}
        for key in self._store.list_keys():
            if any(prefix in key for prefix in prefixes):
                self._store.delete_key(key)

    def mismatches(self, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
        """{server: what differs}, empty where trainer and engines hold the same. Collective, and every rank gives the same `reports`."""
        found = {}
        for receiver in self._receivers:
            if receiver.name in reports:
                expected = self._sender.expected(self._names, receiver.engine)
                problems = compare(expected, reports[receiver.name], self.specs[receiver.name]["version"],
                                   ranks=receiver.tensor_parallel_size)
                if problems:
                    found[receiver.name] = problems
        return found


def compare(expected: Checksums, reports: Sequence[Mapping[str, Any]], version: int, *, ranks: int, first_rank: int = 0) -> list[str]:
    """What differs between the trainer's checksums and those of a replica's `ranks` ranks, in order of their places."""
    if len(reports) != ranks:
        return [f"{len(reports)} reports of the engine ranks from {first_rank} on, expected {ranks}, one of each"]
    problems = []
    for place, report in enumerate(reports):
        if report.get("error"):
            problems.append(report["error"])
            continue
        if report["version"] != version:
            problems.append(f"engine rank {first_rank + place} holds version {report['version']}, expected {version}")
        for name, places in expected.items():
            got, wanted = report["checksums"].get(name), places.get(place)
            if got != wanted:
                problems.append(f"{name} on engine rank {first_rank + place}: checksum {_hex(got)}, the trainer has {_hex(wanted)}")
    return problems


def _hex(checksum: int | None) -> str:
    return "none (not loaded in this sync)" if checksum is None else f"{checksum:016x}"


def _node(rank: int) -> int:
    return rank // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
