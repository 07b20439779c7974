"""One grading worker: a fresh Python process that grades one answer at a time over a pipe.

Started by `GradingPool` with `python -c`, not with `multiprocessing`: its spawn and forkserver methods import the
parent's `__main__` again, which under `python -m megatron_antisd.train` would load torch and vLLM into every worker.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from numbers import Real
from typing import Any

from megatron_antisd.grading.verdict import GradingError, GradingTask, Verdict

MATH_FUNCTION = "megatron_antisd.grading.math:grade"
WATCHDOG_GRACE_SECONDS = 600.0
"""After a task's time. The parent may be busy for long between two looks at its workers; this ends one that it left behind."""
PARENT_POLL_SECONDS = 2.0

# What a worker sends: (kind, value, seconds that the task took). READY "" once; then one of the others for each task.
READY, FAILED_START, VERDICT, RAISED, INVALID = "ready", "failed_start", "verdict", "raised", "invalid"

Grader = Callable[[str, str], "float | tuple[float, str]"]


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker is told when it starts; travels as JSON."""

    function: str | None
    """Dotted path of the user's function, None for the graders of this package."""
    timeout_seconds: float
    memory_bytes: int | None
    """Address space of the worker; None leaves it as it is."""
    sandbox: str | None
    """`SandboxSettings` as JSON; None where no programs are graded."""

    def to_json(self) -> str:
        return json.dumps(self.__dict__)


def serve(descriptor: int, settings: str) -> None:
    """Load the grader, then grade what comes through the connection until it is closed. The body of a worker process."""
    # Ctrl-C goes to the whole terminal group; the parent decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # where cores are few, the engine that is still decoding goes first
    parent = os.getppid()
    connection = Connection(descriptor)
    given = WorkerSettings(**json.loads(settings))
    try:
        grader = load_grader(given)
    except Exception as error:
        connection.send((FAILED_START, str(error), 0.0))
        return
    connection.send((READY, "", 0.0))
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        while True:
            while not connection.poll(PARENT_POLL_SECONDS):
                if os.getppid() != parent:
                    return  # a fork of the parent may hold the pipe open after the parent itself is gone
            task, seconds = connection.recv()
            # The parent ends a worker that takes too long. Should the parent be gone, the thread above does, and this one in C where
            # the task holds the GIL.
            faulthandler.dump_traceback_later(seconds + WATCHDOG_GRACE_SECONDS, exit=True)
            started = time.monotonic()
            outcome = _outcome(grader, given.function, task)
            taken = time.monotonic() - started
            faulthandler.cancel_dump_traceback_later()
            connection.send((*outcome, taken))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the pool was closed


def _end_with(parent: int) -> None:
    """End this process soon after its parent, in the middle of a task too."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)


def load_grader(settings: WorkerSettings) -> Callable[[GradingTask], Any]:
    """What grades a task: the user's function, else the code grader where the task has tests, else the math grader. Limits the memory."""
    if settings.function is not None:
        function = load_function(settings.function)
        _limit_memory(settings.memory_bytes)
        return lambda task: function(task.response, task.answer)
    grade = load_function(MATH_FUNCTION)
    _limit_memory(settings.memory_bytes)
    grade(r"\boxed{\frac{1}{2}}", "0.5")  # compiles the parser's patterns now, not on the first answer's clock
    if settings.sandbox is None:
        return lambda task: _without_tests(task) or grade(task.response, task.answer)
    from megatron_antisd.grading.code import grade_code
    from megatron_antisd.grading.sandbox import SandboxSettings

    sandbox = SandboxSettings.from_json(settings.sandbox)
    return lambda task: grade(task.response, task.answer) if task.tests is None else grade_code(task.response, task.tests, sandbox)


def _without_tests(task: GradingTask) -> None:
    if task.tests is not None:
        raise GradingError("a task with tests came to a grading pool without a sandbox: give GradingPool(sandbox=choose_sandbox(config.grading))")


def load_function(path: str) -> Grader:
    """The callable at `package.module:function`. Raises ValueError that names the path and what is wrong with it."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"grading.function {path!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "it must be importable from the directory or PYTHONPATH that training is started with"
        ) from error
    try:
        function = getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"grading.function {path!r}: module {module_name!r} has no {attribute!r}") from error
    if not callable(function):
        raise ValueError(
            f"grading.function {path!r}: {attribute!r} is a {type(function).__name__}, expected a function (response, answer) -> float"
        )
    return function


def _limit_memory(size: int | None) -> None:
    """Bound the address space: `10^{10^{10}}` must not take the machine's memory. What the worker starts may be given more."""
    if size is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def _outcome(grader: Callable[[GradingTask], Any], function: str | None, task: GradingTask) -> tuple[str, Verdict | str]:
    try:
        value = grader(task)
    except GradingError as error:
        return INVALID, str(error)
    except Exception:
        return RAISED, traceback.format_exc(limit=-3)
    if isinstance(value, Verdict):
        return VERDICT, value
    reward, feedback = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(reward, Real) or not math.isfinite(reward) or not isinstance(feedback, str | None):
        return INVALID, (f"grading function {function!r} returned {value!r:.200} ({type(value).__name__}), expected a finite float, "
                         "or a finite float and a feedback string")
    return VERDICT, Verdict(reward=float(reward), feedback=feedback)
