"""A clean, agreed stop when the scheduler asks for one.

SIGTERM and SIGUSR1 (what SLURM's `--signal` usually sends) set a flag. At a stage's boundary all ranks ask each other whether anyone was asked
to stop, save, and leave with EXIT_PREEMPTED. torchrun would start ranks that leave with any code but 0 again where restarts are left, so it is
asked to stop first; it then ends with 1, and `preempted.json` in the run directory tells the two apart. `megatron_antisd.launch` ends with 75.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megatron_antisd.durable import sync, write_whole
from megatron_antisd.supervision.exit_codes import EXIT_PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "preempted.json"
LAUNCH_FILE = "MEGATRON_ANTISD_LAUNCH_FILE"
"""The environment variable by which `megatron_antisd.launch` names the file that its ranks write to when they leave preempted."""


class Preempted(Exception):
    """Asked to stop; carries what was saved and how to go on."""


_previous: dict[signal.Signals, Any] = {}
_requested = False


def install() -> None:
    """Handle SIGNALS from now on; nothing happens the second time. Raises ValueError outside the main thread. A further signal does not kill
    either: who cannot wait sends SIGKILL, as torchrun does after its `--shutdown-timeout`."""
    global _requested
    if _previous:
        return
    _requested = False
    for number in SIGNALS:
        _previous[number] = signal.signal(number, _on_signal)


def uninstall() -> None:
    """Put the handlers from before `install` back."""
    for number, handler in _previous.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    _previous.clear()


def ignore() -> None:
    """From now on no signal of SIGNALS has any effect: for a process that ends, whose exit code and last words torchrun's SIGTERM must not cut
    off. Python takes handlers away while it shuts down, but leaves this. `uninstall` undoes it."""
    install()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requested() -> bool:
    """Whether this rank was asked to stop."""
    return _requested


def agreed(group: dist.ProcessGroup | None = None) -> bool:
    """Whether any rank of `group` (None: the world) was asked to stop; the same answer on all of them. Collective; needs gloo for CPU tensors."""
    flag = torch.tensor([int(_requested)], dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
    return bool(flag.item())


def leave_preempted(directory: Path, step: int, checkpoint: Path | None) -> NoReturn:
    """Write `preempted.json`, keep torchrun from starting the ranks again, and raise SystemExit(EXIT_PREEMPTED). Collective, at the end of
    everything else. `checkpoint`: what a new start goes on from, None where nothing was saved."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        saved = {"step": step, "checkpoint": str(checkpoint) if checkpoint is not None else None, "host": socket.gethostname(),
                 "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
        write_whole(directory / FILE, [f"{json.dumps(saved, indent=1)}\n".encode()])
    if int(os.environ.get("LOCAL_RANK", "0")) == 0 and LAUNCH_FILE in os.environ:
        Path(os.environ[LAUNCH_FILE]).write_text(f"{step}\n")
    stop_launcher()
    if dist.is_initialized():  # no rank may be gone before every node's agent knows
        dist.all_reduce(torch.zeros(1, dtype=torch.int32))
    ignore()
    raise SystemExit(EXIT_PREEMPTED)


def stop_launcher() -> None:
    """Keep torchrun from starting the ranks again, where it started this one. Every rank calls it: SIGTERM comes back, and has no effect."""
    ignore()
    agent = _agent() if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    if agent is not None:
        os.kill(agent, signal.SIGTERM)


def clear_preempted(directory: Path) -> None:
    """Take away the `preempted.json` of the process before: on the main rank, at a start."""
    path = directory / FILE
    if path.is_file():
        path.unlink()
        sync(directory)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True


def _agent() -> int | None:
    """The process id of the torchrun that started this rank; None without one. It starts each rank in a session of the rank's own, so it is
    the parent of the session's first process, whatever shells lie between."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    leader = os.getsid(0)
    if leader == os.getpid():
        return os.getppid()
    status = Path(f"/proc/{leader}/stat")
    if not status.is_file():
        return None
    return int(status.read_text().rpartition(")")[2].split()[1])


def _in_child() -> None:
    """A fork (a worker of the engine, say) is no rank: a SIGTERM must end it as ever."""
    uninstall()


os.register_at_fork(after_in_child=_in_child)
