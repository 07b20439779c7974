"""An engine that stops answering: a decoding step that does not end is interrupted.

The system's interval timer sends SIGALRM to the main thread, whose handler raises there. That ends a loop in Python, a sleep, a lock or a read that
is waited for. It does not end a call into C code that never looks at signals (a kernel, a collective of NCCL): Python runs no handler
before such a call returns, so only the end of the process helps; the stages' time-outs see to that.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from megatron_antisd.rollout.engine import EngineFailure

_log = logging.getLogger(__name__)


class _Interrupted(BaseException):
    """Passes the `except Exception` of whatever hangs."""


class StallWatch:
    """Bounds each decoding step to `seconds` of wall clock. Open `watching` around a generation and the object itself around each of its steps.

    Python gives signals to the main thread alone: outside of it nothing is watched, and the log says so once. SIGALRM's handler and the
    interval timer are given back when `watching` ends; a timer of someone else's does not run meanwhile.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._armed, self._active, self._told = seconds, False, False, False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            if not self._told:
                _log.warning("the engine is not used from the main thread: a decoding step that never ends is not noticed")
            self._told = True
            yield
            return
        timer = signal.setitimer(signal.ITIMER_REAL, 0.0)
        handler = signal.signal(signal.SIGALRM, self._on_alarm)
        self._active = True
        try:
            yield
        finally:
            self._active = False
            signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, *timer)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Raises EngineFailure in the place of what hangs."""
        if not self._active:
            yield
            return
        try:
            # Again and again: the first one may be swallowed where no exception gets out, as in a destructor.
            signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds)
            self._armed = True
            try:
                yield
            finally:
                self._armed = False
                signal.setitimer(signal.ITIMER_REAL, 0.0)
        except _Interrupted:
            raise EngineFailure(f"a decoding step did not end within {self._seconds:g} s (rollout.stall_seconds)") from None

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if self._armed:
            raise _Interrupted
