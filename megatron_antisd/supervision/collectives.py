"""Which collective this rank's main thread called last, from where, and whether it is still in it.

`install` lays a thin wrapper over torch.distributed's functions, so that Megatron's calls are seen as well as ours; install it before modules
that take the functions by name (`from torch.distributed import all_reduce`) are imported. With NCCL a collective is over, as seen from
here, once it is enqueued: a rank that waits for its GPU is then not inside one, and ranks are told apart by how many collectives they began.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import PurePath
from time import monotonic
from types import CodeType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_antisd.supervision.records import Collective

NAMES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather",
    "gather_object", "irecv", "isend", "monitored_barrier", "new_group", "recv", "recv_object_list", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "send_object_list", "_all_gather_base",
    "_reduce_scatter_base",
)
"""Those that this version of torch has are wrapped. `new_group` is one: all ranks meet in it."""


class _Recorder:
    """What the wrappers note. Only the main thread writes, a whole tuple at a time, so that the watchdog's thread reads no half of one."""

    __slots__ = ("begun", "count", "ended", "inside", "thread")

    def __init__(self) -> None:
        self.thread = threading.main_thread().ident
        self.count = 0
        self.inside = False
        self.begun: tuple[int, str, CodeType, int, float] | None = None  # number, name, the caller's code and line, when
        self.ended: tuple[int, float] = (0, 0.0)  # number, when


_recorder = _Recorder()
_MODULES: tuple[ModuleType, ...] = (dist, distributed_c10d)  # torch.distributed has the functions by name; their own calls go to the second
_originals: dict[str, Callable[..., Any]] = {}
_wrappers: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Wrap the collectives; nothing happens the second time. Call it in the main thread, after the process group has started."""
    if _wrappers:
        return
    for name in NAMES:
        original = getattr(distributed_c10d, name, None)
        if original is not None:
            _originals[name], _wrappers[name] = original, _recorded(name, original)
            _replace(name, original, _wrappers[name])


def uninstall() -> None:
    """Put torch's own functions back; nothing happens where `install` was not called."""
    for name, wrapper in _wrappers.items():
        _replace(name, wrapper, _originals[name])
    _originals.clear()
    _wrappers.clear()


def last() -> Collective | None:
    """The main thread's last collective, None before the first one. May be called from any thread."""
    begun, ended, now = _recorder.begun, _recorder.ended, monotonic()
    if begun is None:
        return None
    number, name, code, line, since = begun
    inside = ended[0] < number
    caller = "/".join(PurePath(code.co_filename).parts[-2:])
    return Collective(name=name, caller=f"{caller}:{line}", number=number, inside=inside, seconds=max(now - (since if inside else ended[1]), 0.0))


def _recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    recorder, is_compiling, get_ident = _recorder, torch.compiler.is_dynamo_compiling, threading.get_ident

    @functools.wraps(function)
    def collective(*args: Any, **kwargs: Any) -> Any:
        # A compiler must see torch's own function, which it replaces. Inside another collective (all_gather_object is made of two
        # all_gathers) the outer name is what the caller wrote.
        if is_compiling() or recorder.inside or get_ident() != recorder.thread:
            return function(*args, **kwargs)
        caller = sys._getframe(1)
        recorder.count = number = recorder.count + 1
        recorder.begun = (number, name, caller.f_code, caller.f_lineno, monotonic())
        del caller  # a frame keeps its variables alive, tensors too
        recorder.inside = True
        try:
            return function(*args, **kwargs)
        finally:
            recorder.inside = False
            recorder.ended = (number, monotonic())

    return collective


def _replace(name: str, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for module in _MODULES:
        if getattr(module, name, None) is old:  # else somebody has laid a wrapper of their own over it
            setattr(module, name, new)
