"""How messages travel between trainer ranks and engine ranks: a small registry of ways, all with one `exchange`.

Run and tested: `process_group` on gloo, `shared_memory`. Written and not run: `process_group` on NCCL, `cuda_ipc`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class TransferError(RuntimeError):
    """A transfer failed or came to a halt; says between whom and where."""


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Who takes part in one transfer, and where they meet."""

    store: dist.Store
    """Of this transfer alone: keys under a prefix that no other one uses."""
    members: tuple[str, ...]
    """Names for messages, in the order of their numbers."""
    number: int
    """This process's."""
    timeout: float
    """Seconds that a peer may take for anything."""
    device: torch.device


class Pending(ABC):
    """Messages under way."""

    @abstractmethod
    def wait(self, timeout: float) -> None:
        """Raises TransferError, which names the peer, where one of them is not through in `timeout` seconds."""


class Transport(ABC):
    """Messages are flat uint8 tensors. Numbers are those of the meeting's members."""

    @abstractmethod
    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Pending:
        """Start to send each tensor to its peer and to fill each tensor from its peer. Between two peers messages keep their order. Tensors are
        left alone until `wait` returns."""

    def close(self) -> None:  # noqa: B027
        """Free what the transfer took; nothing by default."""


class _Works(Pending):
    def __init__(self, works: Sequence[tuple[str, Any]]) -> None:
        self._works = works

    def wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        for what, work in self._works:
            try:
                done = work.wait(timedelta(seconds=max(0.001, end - time.monotonic())))
            except RuntimeError as error:  # gloo and NCCL have no type of their own for a peer that is late or gone
                raise TransferError(f"{what} within {timeout:g} s: {_plain(error)}") from error
            if done is False:
                raise TransferError(f"{what} within {timeout:g} s")


class TrainerGroup(Transport):
    """The trainer's own process group, for engines inside the trainer's processes: peers are ranks of the world."""

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Pending:
        """See Transport. In one batch: unbatched, NCCL would run them one after another in an order of its own."""
        operations = [dist.P2POp(dist.isend, tensor, peer) for peer, tensor in sends.items()]
        operations += [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in receives.items()]
        works = dist.batch_isend_irecv(operations) if operations else []
        whats = [f"rank {peer} did not take its message" for peer in sends] + [f"rank {peer} sent nothing" for peer in receives]
        if len(works) != len(whats):  # NCCL gives one for all
            whats = ["ranks " + ", ".join(map(str, sorted({*sends, *receives}))) + " did not finish"] * len(works)
        return _Works(list(zip(whats, works, strict=True)))


class ProcessGroupTransport(Transport):
    """A process group of the meeting's own. Raises TransferError where not all come in time."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        timeout = timedelta(seconds=meeting.timeout)
        self._nccl = meeting.device.type == "cuda"
        try:
            if self._nccl:
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(meeting.store, meeting.number, len(meeting.members), options)
            else:
                self._group = dist.ProcessGroupGloo(meeting.store, meeting.number, len(meeting.members), timeout)
        except RuntimeError as error:
            raise TransferError(f"{_me(meeting)}: not all of {', '.join(meeting.members)} came to the transfer within {meeting.timeout:g} s: "
                                f"{_plain(error)}") from error

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Pending:
        """See Transport."""
        try:
            return _Works(self._start(sends, receives))
        except RuntimeError as error:
            raise TransferError(f"{_me(self._meeting)}: {_plain(error)}") from error

    def _start(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> list[tuple[str, Any]]:
        me, names = _me(self._meeting), self._meeting.members
        if self._nccl:
            self._group._start_coalescing(self._meeting.device)
        works = [(f"{me}: {names[peer]} did not take its message", self._group.send([tensor], peer, 0)) for peer, tensor in sends.items()]
        works += [(f"{me}: {names[peer]} sent nothing", self._group.recv([tensor], peer, 0)) for peer, tensor in receives.items()]
        if not self._nccl:
            return works
        together = ", ".join(names[peer] for peer in sorted({*sends, *receives}))
        return [(f"{me}: {together} did not finish", self._group._end_coalescing(self._meeting.device))]

    def close(self) -> None:
        """See Transport."""
        with contextlib.suppress(RuntimeError):  # a peer that is gone already
            self._group.shutdown()


class _ThroughStore(Transport):
    """The sender leaves a note in the store how to reach the bytes; the receiver copies them and says so, and then they are given back."""

    def __init__(self, meeting: Meeting) -> None:
        self._meeting = meeting
        self._sent: dict[int, int] = {}
        self._received: dict[int, int] = {}
        self._lent: dict[str, Any] = {}

    @abstractmethod
    def lend(self, key: str, tensor: torch.Tensor) -> tuple[bytes, Any]:
        """(note for the receiver, what keeps the bytes alive)."""

    @abstractmethod
    def borrow(self, note: bytes, into: torch.Tensor) -> None:
        """Copy the bytes a note leads to; they may be gone afterwards."""

    def give_back(self, lent: Any) -> None:
        """Of a message that was copied, or never will be."""

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Pending:
        """See Transport."""
        me = self._meeting.number
        notes = []
        for peer, tensor in sends.items():
            key = f"{me}/{peer}/{self._next(self._sent, peer)}"
            note, self._lent[key] = self.lend(key, tensor)
            self._meeting.store.set(key, note)
            notes.append((peer, key))
        wanted = [(peer, f"{peer}/{me}/{self._next(self._received, peer)}", tensor) for peer, tensor in receives.items()]
        return _Notes(self, notes, wanted)

    def close(self) -> None:
        """See Transport."""
        for lent in self._lent.values():
            self.give_back(lent)
        self._lent.clear()

    @staticmethod
    def _next(counts: dict[int, int], peer: int) -> int:
        counts[peer] = counts.get(peer, -1) + 1
        return counts[peer]


class _Notes(Pending):
    def __init__(self, transport: _ThroughStore, sent: list[tuple[int, str]], wanted: list[tuple[int, str, torch.Tensor]]) -> None:
        self._transport, self._sent, self._wanted = transport, sent, wanted

    def wait(self, timeout: float) -> None:
        transport, meeting, end = self._transport, self._transport._meeting, time.monotonic() + timeout
        for peer, key, tensor in self._wanted:
            self._await(key, end, timeout, f"{meeting.members[peer]} sent nothing")
            transport.borrow(meeting.store.get(key), tensor)
            meeting.store.set(f"{key}/copied", b"1")
        for peer, key in self._sent:
            self._await(f"{key}/copied", end, timeout, f"{meeting.members[peer]} did not take its message")
            transport.give_back(transport._lent.pop(key))
            for done in (key, f"{key}/copied"):
                meeting.store.delete_key(done)

    def _await(self, key: str, end: float, timeout: float, what: str) -> None:
        meeting = self._transport._meeting
        try:
            meeting.store.wait([key], timedelta(seconds=max(0.001, end - time.monotonic())))
        except RuntimeError as error:
            raise TransferError(f"{_me(meeting)}: {what} within {timeout:g} s") from error


SHARED_MEMORY = Path("/dev/shm")


class SharedMemoryTransport(_ThroughStore):
    """Files in the system's shared memory, for trainer and engine on one node."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__(meeting)
        if meeting.device.type != "cpu":
            raise TransferError(f"shared memory holds no tensors of {meeting.device}: set sync.transport to process_group or cuda_ipc")

    def lend(self, key: str, tensor: torch.Tensor) -> tuple[bytes, Any]:
        """See _ThroughStore."""
        path = SHARED_MEMORY / f"megatron_antisd-{secrets.token_hex(16)}"
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), "r+b") as file:
            file.truncate(max(1, tensor.numel()))
            with contextlib.closing(mmap.mmap(file.fileno(), 0)) as memory:
                memory[: tensor.numel()] = memoryview(tensor.numpy())
        return str(path).encode(), path

    def borrow(self, note: bytes, into: torch.Tensor) -> None:
        """See _ThroughStore."""
        try:
            with Path(note.decode()).open("rb", buffering=0) as file:
                Path(note.decode()).unlink()  # whoever has it open keeps it
                rest = memoryview(into.numpy())
                while rest and (count := file.readinto(rest)):  # one call returns at most 2 GiB
                    rest = rest[count:]
        except OSError as error:
            raise TransferError(f"{_me(self._meeting)}: {note.decode()} cannot be read ({error}): sync.transport=shared_memory needs trainer and "
                                "engine on one node, and in one container") from error
        if len(rest):
            raise TransferError(f"{_me(self._meeting)}: {note.decode()} holds {into.numel() - len(rest)} bytes, expected {into.numel()}")

    def give_back(self, lent: Any) -> None:
        """See _ThroughStore."""
        lent.unlink(missing_ok=True)


class CudaIpcTransport(_ThroughStore):
    """Handles on GPU memory, for trainer and engine on the same GPU. Not run."""

    def __init__(self, meeting: Meeting) -> None:
        super().__init__(meeting)
        if meeting.device.type != "cuda":
            raise TransferError(f"sync.transport=cuda_ipc needs GPUs, this rank computes on {meeting.device}: set process_group or shared_memory")

    def lend(self, key: str, tensor: torch.Tensor) -> tuple[bytes, Any]:
        """See _ThroughStore."""
        from torch.multiprocessing.reductions import reduce_tensor

        torch.cuda.current_stream(self._meeting.device).synchronize()  # the receiver's streams know nothing of this one's
        _, arguments = reduce_tensor(tensor)
        # Numbers and bytes alone, as JSON: the store has no access control, and a pickle from it could be anybody's code.
        shape = (list(arguments[1]), list(arguments[2]), arguments[3])
        note = [value.hex() if isinstance(value, bytes) else value for value in (*shape, *arguments[7:])]
        return json.dumps([str(torch.cuda.get_device_properties(self._meeting.device).uuid), *note]).encode(), tensor

    def borrow(self, note: bytes, into: torch.Tensor) -> None:
        """See _ThroughStore."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        gpu, size, stride, offset, handle, *rest = json.loads(note)
        mine = str(torch.cuda.get_device_properties(self._meeting.device).uuid)
        if gpu != mine:
            raise TransferError(f"{_me(self._meeting)}: the sender's memory is on the GPU {gpu}, this rank's GPU is {mine}: sync.transport=cuda_ipc "
                                "needs both on one; set process_group")
        rest = [bytes.fromhex(value) if isinstance(value, str) else value for value in rest]
        into.copy_(rebuild_cuda_tensor(torch.Tensor, size, stride, offset, torch.UntypedStorage, torch.uint8, self._meeting.device.index,
                                       bytes.fromhex(handle), *rest))
        torch.cuda.current_stream(self._meeting.device).synchronize()


TRANSPORTS: dict[str, Callable[[Meeting], Transport]] = {
    "process_group": ProcessGroupTransport, "shared_memory": SharedMemoryTransport, "cuda_ipc": CudaIpcTransport}
"""`sync.transport` -> what opens it. A further one registers itself here, in trainer and engine."""


def open_transport(name: str, meeting: Meeting) -> Transport:
    """Raises TransferError for a name nobody registered, or where the others do not come in time."""
    if name not in TRANSPORTS:
        raise TransferError(f"transport {name!r} is not known here, only {sorted(TRANSPORTS)}")
    return TRANSPORTS[name](meeting)


def members(senders: Sequence[int], server: str, engine_size: int) -> tuple[str, ...]:
    """Names of those who take part in a transfer to one server, in the order of their numbers: trainer ranks, then the server's."""
    return (*(f"trainer rank {rank}" for rank in senders), *(f"engine rank {place} of {server}" for place in range(engine_size)))


def _plain(error: RuntimeError) -> str:
    """Its first sentence; gloo adds advice and where in its source it was."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". This is")[0].rpartition(".cc:")[2].rpartition("] ")[2]


def _me(meeting: Meeting) -> str:
    return meeting.members[meeting.number]
