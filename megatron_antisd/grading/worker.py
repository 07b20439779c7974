"""One grading worker: a fresh Python process that answers one (response, answer) pair at a time over a pipe.

Started by `GradingPool` with `python -c`, not with `multiprocessing`: its spawn and forkserver methods import the
parent's `__main__` again, which under `python -m megatron_antisd.train` would load torch and vLLM into every worker.
"""

from __future__ import annotations

import faulthandler
import importlib
import math
import os
import resource
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from numbers import Real

MATH_FUNCTION = "megatron_antisd.grading.math:grade"
MATH_MEMORY_BYTES = 4 << 30
"""Address space of a worker of the math grader: `10^{10^{10}}` must not take the machine's memory."""
WATCHDOG_GRACE_SECONDS = 10.0
PARENT_POLL_SECONDS = 2.0

# What a worker sends: (kind, value). READY "" once; then one of the others for each pair.
READY, FAILED_START, REWARD, RAISED, INVALID = "ready", "failed_start", "reward", "raised", "invalid"

Grader = Callable[[str, str], float]


def serve(descriptor: int, function: str, timeout_seconds: float) -> None:
    """Load `function`, then grade what comes through the connection until it is closed. The body of a worker process."""
    # Ctrl-C goes to the whole terminal group; the parent decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    connection = Connection(descriptor)
    try:
        grade = load_function(function)
    except Exception as error:
        connection.send((FAILED_START, str(error)))
        return
    if function == MATH_FUNCTION:
        _limit_memory(MATH_MEMORY_BYTES)
        grade(r"\boxed{\frac{1}{2}}", "0.5")  # compiles the parser's patterns now, not on the first answer's clock
    connection.send((READY, ""))
    try:
        while True:
            while not connection.poll(PARENT_POLL_SECONDS):
                if os.getppid() != parent:
                    return  # a fork of the parent may hold the pipe open after the parent itself is gone
            response, answer = connection.recv()
            # The parent ends a worker that takes too long. Should the parent be gone, this C thread does (no GIL needed).
            faulthandler.dump_traceback_later(timeout_seconds + WATCHDOG_GRACE_SECONDS, exit=True)
            outcome = _outcome(grade, function, response, answer)
            faulthandler.cancel_dump_traceback_later()
            connection.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the pool was closed


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


def _limit_memory(size: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


def _outcome(grade: Grader, function: str, response: str, answer: str) -> tuple[str, float | str]:
    try:
        value = grade(response, answer)
    except Exception:
        return RAISED, traceback.format_exc(limit=-3)
    if not isinstance(value, Real):
        return INVALID, f"grading function {function!r} returned {value!r} ({type(value).__name__}), expected a finite float"
    if not math.isfinite(value):
        return INVALID, f"grading function {function!r} returned {value!r}, expected a finite float"
    return REWARD, float(value)
