"""One sandboxed process, seen from the trusted side: start it, hand it a job, read what comes back, end it.

`sandbox_inside` shuts the process in and `sandbox_runner` runs the job there; `sandbox_choice` says which mode works on this machine.
"""

from __future__ import annotations

import functools
import json
import marshal
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_antisd.grading import seccomp
from megatron_antisd.grading.sandbox_inside import DEVICES

START_SECONDS = 30.0
"""Time-out of a sandbox's start (10 to 30 ms on an idle machine); it is not on the program's clock."""
MAX_FRAME_BYTES = 32 << 20
MAX_VALUE_BYTES = 8 << 20
"""Of a frame with one value: more than `encode` writes, with the brackets of all its nodes."""
MAX_TOTAL_BYTES = 128 << 20
MAX_OUTPUT_BYTES = 4 << 20
"""Of what a program writes to its standard output for one input; more fails that input."""
SCRATCH, SCRATCH_BYTES = "/scratch", 64 << 20
OPEN_FILES, PROCESSES, STACK_BYTES = 64, 64, 8 << 20

_INSIDE = ("encoding", "sandbox_inside", "sandbox_runner")
_PACKAGE = "megatron_antisd.grading"
_BOOT = """
import marshal, os, sys
def take(count):
    parts = b""
    while len(parts) < count:
        part = os.read(0, count - len(parts))
        if not part:
            os._exit(0)
        parts += part
    return marshal.loads(parts)
modules, config = take(int(sys.argv[1])), take(int(sys.argv[2]))
for name in ("megatron_antisd", "megatron_antisd.grading"):
    sys.modules[name] = type(sys)(name)
    sys.modules[name].__path__ = []
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    exec(code, module.__dict__)
module.main(config)
"""
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": SCRATCH, "TMPDIR": SCRATCH, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ALSO_SHOWN = ("/etc/ld.so.cache", "/etc/alternatives")
_FIRST_USER = 1_900_000_000
"""Ids from here on belong to nobody: no distribution assigns them, and containers' ranges end below."""
_NOBODY = 65534


class SandboxError(RuntimeError):
    """A sandbox cannot be set up here. Never the program's fault."""


class SandboxEndedError(Exception):
    """The process inside is gone, or sends what is no frame."""


class SandboxTimeoutError(Exception):
    """The process inside did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """How programs are run. Example: `SandboxSettings(mode="builtin")`; `choose_sandbox` makes one that works on this machine."""

    mode: str
    """`bubblewrap`, `builtin` or `limits`."""
    seconds: float = 60.0
    """Wall clock of one program over all its tests."""
    case_seconds: float = 5.0
    """Wall clock of one test, kept by a timer inside that a hostile program can switch off: `seconds` bounds it then."""
    memory_bytes: int = 1 << 30
    """Address space of the program."""

    @property
    def deadline(self) -> float:
        """Seconds after which a whole grading is surely over: the checker is tried, then the program, then the checks, each started anew."""
        return 3 * (self.seconds + START_SECONDS)

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @staticmethod
    def from_json(text: str) -> SandboxSettings:
        return SandboxSettings(**json.loads(text))

    def within(self, seconds: float) -> SandboxSettings:
        return replace(self, seconds=seconds, case_seconds=min(self.case_seconds, seconds))


class Sandbox:
    """A fresh process, shut in and ready for one job. A context manager; at its end the process and all it started are dead.

    Raises SandboxError when it cannot be shut in as `settings` say.
    """

    def __init__(self, settings: SandboxSettings) -> None:
        self._received = 0
        self._scratch = None
        user = own_user()
        if settings.mode == "limits":
            self._scratch = tempfile.mkdtemp(prefix="antisd-scratch-")
            if user is not None:
                os.chown(self._scratch, user, user)
        modules, config = _modules(), marshal.dumps(_config(settings, user, self._scratch))
        command = [*_prefix(settings, user), _interpreter(), "-I", "-S", "-c", _BOOT, str(len(modules)), str(len(config)),
                   f"of-{os.getpid()}"]  # for people who look at a list of processes
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_ENVIRONMENT, cwd="/", bufsize=0,
                start_new_session=settings.mode != "bubblewrap")
        except OSError as error:
            self._remove_scratch()
            raise SandboxError(f"{command[0]} cannot be started: {error}") from error
        self._requests, self._results = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)
        try:
            self._wait_until_ready(modules + config)
        except BaseException:
            self.close()
            raise

    def send(self, job: Any, deadline: float) -> None:
        """Hand over plain values. Raises SandboxTimeoutError, SandboxEndedError."""
        data = marshal.dumps(job)
        self._write(len(data).to_bytes(4, "little") + data, deadline)

    def receive(self, deadline: float, largest: int = MAX_FRAME_BYTES) -> list[Any]:
        """The next frame, a JSON list of a word, and an integer or a text. Raises SandboxTimeoutError, SandboxEndedError."""
        size = int.from_bytes(self._exactly(4, deadline), "little")
        self._received += size
        if size > largest or self._received > MAX_TOTAL_BYTES:
            raise SandboxEndedError("it sent more than it may")
        try:
            frame = json.loads(self._exactly(size, deadline))
        except (ValueError, RecursionError) as error:
            raise SandboxEndedError("it sent what is no frame") from error
        if not isinstance(frame, list) or not frame or not isinstance(frame[0], str):
            raise SandboxEndedError("it sent what is no frame")
        return frame

    def close(self) -> None:
        """Kill the process and wait for it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe.close()
        self._remove_scratch()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _remove_scratch(self) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _wait_until_ready(self, boot: bytes) -> None:
        deadline = time.monotonic() + START_SECONDS
        try:
            self._write(boot, deadline)
            frame = self.receive(deadline)
        except SandboxTimeoutError as error:
            raise SandboxError(f"it was not ready within {START_SECONDS:.0f} s") from error
        except SandboxEndedError as error:
            errors = self._process.stderr.fileno()
            said = os.read(errors, 4096).decode(errors="replace") if select.select([errors], [], [], 1.0)[0] else ""
            raise SandboxError(f"its process ended while it was being set up; {said.strip()[-400:] or 'it said nothing'}") from error
        if frame[0] != "ready":
            raise SandboxError(str(frame[1]))

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            patience = deadline - time.monotonic()
            if patience <= 0 or not select.select([], [self._requests], [], patience)[1]:
                raise SandboxTimeoutError
            try:
                view = view[os.write(self._requests, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as error:
                raise SandboxEndedError("it is gone") from error

    def _exactly(self, count: int, deadline: float) -> bytes:
        parts = []
        while count:
            patience = deadline - time.monotonic()
            if patience <= 0 or not select.select([self._results], [], [], patience)[0]:
                raise SandboxTimeoutError
            part = os.read(self._results, min(count, 1 << 20))
            if not part:
                raise SandboxEndedError("it is gone")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def start_sandbox(settings: SandboxSettings) -> Sandbox:
    """A sandbox, tried anew when the machine is short of something for a moment. Raises SandboxError when it stays so."""
    for pause in (0.1, 1.0):
        try:
            return Sandbox(settings)
        except SandboxError:
            time.sleep(pause)
    return Sandbox(settings)


@functools.cache
def own_user() -> int | None:
    """The unprivileged id that this process's sandboxes run under: one of its own where it can be had. None without root's rights."""
    if os.geteuid() != 0:
        return None
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for user in (_FIRST_USER + os.getpid() % 100_000_000, _NOBODY):
        if any(first <= user < first + count for first, _, count in ranges):
            return user
    return None


def _config(settings: SandboxSettings, user: int | None, scratch: str | None) -> dict[str, Any]:
    cpu, filters = int(settings.seconds) + 2, seccomp.filters()
    links, binds = shown()
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1), "RLIMIT_AS": (settings.memory_bytes,) * 2, "RLIMIT_FSIZE": (SCRATCH_BYTES,) * 2,
        "RLIMIT_NOFILE": (OPEN_FILES,) * 2, "RLIMIT_NPROC": (_processes(settings.mode, user),) * 2,
        "RLIMIT_CORE": (0, 0), "RLIMIT_MEMLOCK": (0, 0), "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_STACK": (STACK_BYTES,) * 2,
    }  # fmt: skip
    return {
        "mode": settings.mode, "parent": os.getpid(), "user": user, "limits": limits, "links": links, "binds": binds,
        "scratch": scratch or SCRATCH, "scratch_bytes": SCRATCH_BYTES, "packages": _packages(),
        "guard": filters and filters[0], "program": filters and filters[1],
    }  # fmt: skip


def _processes(mode: str, user: int | None) -> int:
    """RLIMIT_NPROC counts all threads of the user: with an id or a namespace of its own only the sandbox's."""
    if user is not None or mode != "limits":
        return PROCESSES
    return PROCESSES + sum(sum(1 for _ in path.iterdir()) for path in _own_tasks())


def _own_tasks() -> Iterator[Path]:
    for path in Path("/proc").glob("[0-9]*/task"):
        try:
            if path.stat().st_uid == os.getuid():
                yield path
        except FileNotFoundError:
            continue


def _prefix(settings: SandboxSettings, user: int | None) -> list[str]:
    """The command that stands before the interpreter."""
    if settings.mode != "bubblewrap":
        return []
    links, binds = shown()
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent",
               "--new-session", "--hostname", "sandbox", "--clearenv"]
    command += [part for name, value in _ENVIRONMENT.items() for part in ("--setenv", name, value)]
    if user is None:
        command += ["--unshare-user", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--cap-drop", "ALL"]
    else:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += [part for source, place in links for part in ("--symlink", source, place)]
    for path in (*binds, *(f"/dev/{name}" for name in DEVICES)):
        parents = [str(parent) for parent in reversed(Path(path).parents)][1:]
        command += [part for parent in parents for part in ("--perms", "0755", "--dir", parent)]  # bubblewrap's own would be closed to others
        command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    return [*command, "--proc", "/proc", "--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", SCRATCH, "--remount-ro", "/",
            "--chdir", SCRATCH, "--"]


@functools.cache
def shown() -> tuple[list[tuple[str, str]], list[str]]:
    """(symbolic links, paths) of the host that a sandbox sees, read-only: the system's libraries, the interpreter, its packages."""
    links, binds = [], []
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", *_ALSO_SHOWN):
        if os.path.islink(path):
            links.append((os.readlink(path), path))
        elif os.path.exists(path):
            binds.append(path)
    for path in [sys.base_prefix, sys.base_exec_prefix, os.path.dirname(_interpreter()), *_packages()]:
        if os.path.isdir(path) and not any(path == seen or path.startswith(seen + "/") for seen in binds):
            binds.append(path)
    return links, binds


@functools.cache
def _packages() -> list[str]:
    return [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages") and os.path.isdir(path)]


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


@functools.cache
def _modules() -> bytes:
    """The code that goes in, compiled once for all sandboxes of this process."""
    folder = Path(__file__).parent
    modules = []
    for name in _INSIDE:
        source = (folder / f"{name}.py").read_text()
        modules.append((f"{_PACKAGE}.{name}", compile(source, f"<{name}>", "exec", dont_inherit=True)))
    return marshal.dumps(modules)
