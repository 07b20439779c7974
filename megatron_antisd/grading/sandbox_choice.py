"""Which sandbox works on this machine, and which protections it really gives: found out by trying, once in a process."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_antisd.config import GradingConfig
from megatron_antisd.grading.sandbox import (
    Sandbox,
    SandboxEndedError,
    SandboxError,
    SandboxSettings,
    SandboxTimeoutError,
    own_user,
)

logger = logging.getLogger(__name__)

MODES = ("bubblewrap", "builtin", "limits")
"""The best first."""
PROTECTIONS = {
    "files": "the host's files cannot be read", "writes": "nothing can be written outside of the scratch directory",
    "network": "no connection to the host", "processes": "no new processes", "signals": "no signals to the host's processes",
    "pids": "the host's processes are invisible", "syscalls": "a seccomp filter", "user": "a user without rights of its own",
    "privileges": "no way to gain privileges", "memory": "a memory limit",
}  # fmt: skip
_PROBE_SECONDS = 10.0
_PROBE_MEMORY_BYTES = 512 << 20
_PROBE = """
import ctypes, math, os, socket

def refused(action):
    try:
        action()
    except (OSError, MemoryError):
        return True
    return False

def connect(port):
    with socket.socket() as one:
        one.settimeout(2)
        one.connect(("127.0.0.1", port))

def write(path):
    open(path, "w").close()

def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

def look(pid, uid, port, readable, folder, memory):
    control = ctypes.CDLL(None).prctl
    return {
        "files": refused(lambda: open(readable)),
        "writes": all(refused(lambda path=path: write(path)) for path in (folder + "/new", "/new", "/usr/new")),
        "network": refused(lambda: connect(port)), "processes": refused(fork),
        "signals": refused(lambda: os.kill(pid, 0)) and refused(lambda: os.kill(-1, 0)), "pids": not os.path.exists(f"/proc/{pid}/stat"),
        "syscalls": control(21, 0, 0, 0, 0) == 2, "user": os.getuid() != 0 and (os.getuid() != uid or not os.path.exists(readable)),
        "privileges": control(39, 0, 0, 0, 0) == 1, "memory": refused(lambda: bytearray(memory)),
    }
"""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What trying a mode showed."""

    mode: str
    works: bool
    reason: str = ""
    """Why it does not work."""
    missing: tuple[str, ...] = ()
    """Keys of PROTECTIONS that it does not give here."""


def choose_sandbox(config: GradingConfig) -> SandboxSettings:
    """Settings whose mode works here. Logs one line with the mode and what it lacks. Raises SandboxError where the configured one does not."""
    found = decide(config.sandbox, config.allow_weak_sandbox, probe)
    lacks = "; ".join(PROTECTIONS[key] for key in found.missing)
    logger.log(logging.WARNING if found.missing else logging.INFO, "programs are graded in the sandbox %r; %s", found.mode,
               f"missing here: {lacks}" if lacks else "every protection was tried and holds")
    return SandboxSettings(mode=found.mode, seconds=config.code_seconds, case_seconds=min(config.case_seconds, config.code_seconds),
                           memory_bytes=config.code_memory_bytes)


def decide(wanted: str, allow_weak: bool, probe: Callable[[str], Probe]) -> Probe:
    """The mode to take: `wanted`, or with `auto` the first that works. Raises SandboxError that says what failed and what to do."""
    tried: list[Probe] = []
    for mode in MODES if wanted == "auto" else (wanted,):
        tried.append(probe(mode))
        if not tried[-1].works:
            continue
        if mode == "limits" and not allow_weak:
            lacks = "; ".join(PROTECTIONS[key] for key in tried[-1].missing)
            raise SandboxError(
                f"{_failures(tried[:-1])}only resource limits work here, and under them this is missing: {lacks}. {_REMEDY}, or set "
                "grading.allow_weak_sandbox=true where the programs can be trusted or the machine has nothing to lose")
        return tried[-1]
    raise SandboxError(f"grading.sandbox={wanted}: {_failures(tried)}{_REMEDY}")


_REMEDY = ("Install bubblewrap (apt-get install bubblewrap) and let it make namespaces: allow user namespaces, "
           "or run as root with CAP_SYS_ADMIN in a container")


def _failures(tried: list[Probe]) -> str:
    return "".join(f"{one.mode} does not work ({one.reason}). " for one in tried)


@functools.cache
def probe(mode: str) -> Probe:
    """Start a sandbox of this mode and let a program in it try what it must not be able to do."""
    if mode == "bubblewrap" and shutil.which("bwrap") is None:
        return Probe(mode=mode, works=False, reason="there is no bwrap on PATH")
    user = own_user()
    if mode == "limits" and user is not None and (closed := closed_to(user, Path(os.__file__))) is not None:
        return Probe(mode=mode, works=False, reason=f"programs run under the id {user}, which cannot read the interpreter: {closed} is closed "
                     "to others; use an interpreter that everybody may read (chmod o+rx on that path), or start as another user than root")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o777)
        readable = Path(folder) / "readable"
        readable.write_text("")
        readable.chmod(0o644)
        given = (os.getpid(), os.getuid(), server.getsockname()[1], str(readable), folder, 2 * _PROBE_MEMORY_BYTES)
        try:
            held = _look(mode, given)
        except SandboxError as error:
            return Probe(mode=mode, works=False, reason=str(error))
    return Probe(mode=mode, works=True, missing=tuple(key for key in PROTECTIONS if not held.get(key)))


def closed_to(user: int, path: Path) -> Path | None:
    """The outermost part of a path that this user, a member of no group, may not enter or read; None where the way is free."""
    path = path.resolve()
    for part in (*reversed(path.parents), path):
        status = part.stat()
        shift = 6 if status.st_uid == user else 3 if status.st_gid == user else 0
        needed = 0o4 if part == path else 0o5 if part == path.parent else 0o1
        if status.st_mode >> shift & needed != needed:
            return part
    return None


def _look(mode: str, given: tuple[object, ...]) -> dict[str, bool]:
    settings = SandboxSettings(mode=mode, seconds=_PROBE_SECONDS, memory_bytes=_PROBE_MEMORY_BYTES)
    deadline = time.monotonic() + _PROBE_SECONDS
    job = {"kind": "function", "preamble": "", "source": _PROBE, "entry_point": "look", "inputs": [given], "seconds": _PROBE_SECONDS}
    try:
        with Sandbox(settings) as sandbox:
            sandbox.send(job, deadline)
            frames = [sandbox.receive(deadline)]
            if frames[0][0] == "loaded":
                frames.append(sandbox.receive(deadline))
    except (SandboxEndedError, SandboxTimeoutError) as error:
        raise SandboxError(f"a test program in it ended without an answer ({type(error).__name__} {error})") from error
    if frames[-1][0] != "case":
        raise SandboxError(f"a test program in it failed: {frames[-1][-1]}")
    pairs = frames[-1][2][1:]
    return dict(zip(pairs[::2], pairs[1::2], strict=True))
