"""Grading in worker processes with real wall-clock time-outs.

An answer that hangs (a loop, an endless simplification inside C code) or kills its process costs that one answer: the
worker is killed and replaced, the reward is 0.0 and the report counts it. No signals inside the worker, no threads in
the parent: one loop waits on the pipes of all workers, so the pool works in every rank under torchrun.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Pipe, wait
from types import TracebackType

from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.grading.verdict import CRASH, TIMEOUT, GradingError, GradingReport, GradingTask, Verdict
from megatron_antisd.grading.worker import FAILED_START, INVALID, MATH_FUNCTION, RAISED, READY, VERDICT, WorkerSettings

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Time-out of a worker's start: importing the function's module. Generous, for a network file system with many ranks."""
START_ATTEMPTS = 3
"""Workers that may be lost in a row without having graded anything (while starting or idle) before the pool gives up."""

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_WORKER_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from megatron_antisd.grading.worker import serve; serve(int(sys.argv[2]), sys.argv[3])"
)


DEFAULT_MEMORY_BYTES = 4 << 30


class _Worker:
    """A worker process, its pipe and what it is busy with."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.connection, child = Pipe()
        self.ready = False
        self.index: int | None = None
        """Of the task it is grading."""
        self.seconds = 0.0
        """Wall clock that it was given for that."""
        self.deadline = time.monotonic() + START_SECONDS
        command = [sys.executable, "-c", _WORKER_CODE, json.dumps(sys.path), str(child.fileno()), settings.to_json()]
        # Its own process group, so that whatever a user's function starts is killed with the worker.
        self.process = subprocess.Popen(
            command, pass_fds=(child.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        child.close()

    def kill(self) -> int:
        """End the process and what it started; returns its exit code (negative: the signal)."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended already
        self.connection.close()
        return self.process.wait()


class GradingPool:
    """`workers` processes that grade, `timeout_seconds` of wall clock for each answer and `memory_bytes` of address space each.

    `function` is a dotted path `package.module:function` with the signature `(response: str, answer: str) -> float`, or
    `-> (float, feedback)`. It is loaded in the workers only, before the constructor returns. None: a task with tests goes to the code
    grader, which needs `sandbox` and has that one's deadline instead of `timeout_seconds`; any other task goes to the math grader.

    Raises GradingError when the function cannot be loaded. Use as a context manager or call `close`; at the latest the
    workers end with the pool's owner.
    """

    def __init__(self, workers: int, timeout_seconds: float, function: str | None = None, *,
                 memory_bytes: int | None = DEFAULT_MEMORY_BYTES, sandbox: SandboxSettings | None = None) -> None:
        if workers < 1:
            raise ValueError(f"GradingPool: workers is {workers}, expected at least 1")
        if not 0 < timeout_seconds < float("inf"):
            raise ValueError(f"GradingPool: timeout_seconds is {timeout_seconds}, expected a positive number of seconds")
        if function is not None and not _DOTTED_PATH.fullmatch(function):
            raise GradingError(f"grading.function is {function!r}, expected 'package.module:function'")
        self._function = function or MATH_FUNCTION
        self._timeout = timeout_seconds
        self._code_timeout = timeout_seconds if function is not None or sandbox is None else sandbox.deadline
        self._settings = WorkerSettings(function=function, timeout_seconds=timeout_seconds, memory_bytes=memory_bytes,
                                        sandbox=sandbox and sandbox.to_json())
        self._lost = 0
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())
        try:
            self._workers.extend(_Worker(self._settings) for _ in range(workers))
            while not all(worker.ready for worker in self._workers):
                self._await_messages(_Call())
        except BaseException:
            self.close()
            raise

    def grade_many(self, tasks: Sequence[GradingTask]) -> GradingReport:
        """Grade the tasks; the verdicts come in their order. Safe to call from any thread, one call at a time.

        Raises GradingError when the function returns something other than a finite number (and a feedback string), when it raises on
        every task, and when a task's tests are broken: a broken grader must not look like a policy that solves nothing.
        """
        grading = self.open()
        for task in tasks:
            grading.add(task)
        return grading.report()

    def open(self) -> OpenGrading:
        """Grade tasks as they come; the caller ends it with `report` or `abandon`, and until then nobody else grades with this pool."""
        self._lock.acquire()
        if not self._finalizer.alive:
            self._lock.release()
            raise GradingError("the grading pool is closed")
        return OpenGrading(self)

    def _work(self, call: _Call, *, until_done: bool) -> None:
        """Hand out and receive: all that is possible now, or until every task has a verdict."""
        self._hand_out(call)
        if not until_done and any(not worker.ready or worker.index is not None for worker in self._workers):
            self._await_messages(call, patience=0.0)
            self._hand_out(call)
        while until_done and call.open:
            self._await_messages(call)
            self._hand_out(call)

    def _stop_tasks(self) -> None:
        for slot, worker in enumerate(self._workers):
            if worker.index is not None:
                self._replace(slot, None)

    def close(self) -> None:
        """Kill the workers. Idempotent."""
        self._finalizer()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hand_out(self, call: _Call) -> None:
        for slot, worker in enumerate(self._workers):
            if not call.waiting:
                return
            if not worker.ready or worker.index is not None:
                continue
            task = call.tasks[call.waiting[0]]
            worker.seconds = self._timeout if task.tests is None else self._code_timeout
            try:
                worker.connection.send((task, worker.seconds))
            except OSError:
                self._replace(slot, "while idle")  # died between two answers: no answer's fault
                continue
            worker.index = call.waiting.popleft()
            worker.deadline = time.monotonic() + worker.seconds

    def _await_messages(self, call: _Call, patience: float | None = None) -> None:
        """Wait (for `patience` seconds at most) for one message, one death or one deadline, and deal with all that happened by then."""
        busy = [w for w in self._workers if not w.ready or w.index is not None]
        if patience is None:
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        messages = wait([worker.connection for worker in busy], timeout=patience)
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            if worker.connection in messages:
                self._receive(slot, worker, call)
            elif worker in busy and now >= worker.deadline:
                if worker.index is None:
                    raise GradingError(f"a grading worker did not load {self._function!r} within {START_SECONDS:.0f} s")
                logger.warning("grading of answer %d took longer than %g s; it scores 0", worker.index, worker.seconds)
                call.fail(worker.index, timeout=True)
                self._replace(slot, None)

    def _receive(self, slot: int, worker: _Worker, call: _Call) -> None:
        try:
            kind, value, seconds = worker.connection.recv()
        except (EOFError, OSError):  # at the end of a message, or in the middle of one
            if worker.index is None:
                self._replace(slot, "while starting")
                return
            call.fail(worker.index)
            code = self._replace(slot, None)
            logger.warning("a grading worker died on answer %d (exit code %d); it scores 0", worker.index, code)
            return
        if kind in (FAILED_START, INVALID):
            raise GradingError(value)
        if kind == READY:
            worker.ready = True
            return
        if seconds > worker.seconds:  # nobody looked in between; what it gets must not depend on that
            call.fail(worker.index, timeout=True)
        elif kind == VERDICT:
            call.settle(worker.index, value)
        elif kind == RAISED:
            call.fail(worker.index, trace=value)
        worker.index = None
        self._lost = 0

    def _replace(self, slot: int, lost: str | None) -> int:
        """A fresh worker in place of this one. `lost` says when it died if that was not an answer's doing."""
        code = self._workers[slot].kill()
        if lost is not None:
            self._lost += 1
            logger.warning("a grading worker died %s (exit code %d)", lost, code)
            if self._lost >= START_ATTEMPTS:
                raise GradingError(
                    f"{self._lost} grading workers in a row died without an answer, the last {lost} with exit code {code} "
                    "(-9: killed, perhaps out of memory); their own messages are on stderr"
                )
        self._workers[slot] = _Worker(self._settings)
        return code


class OpenGrading:
    """Tasks that are graded while others are still being made: `add` them, `poll` now and then, `report` at the end.

    Whoever may fail before the report calls `abandon` then, or uses this as a context manager, so that the pool is free for the next.
    """

    def __init__(self, pool: GradingPool) -> None:
        self._pool, self._call, self._ended = pool, _Call(), False

    def add(self, task: GradingTask) -> None:
        self._call.add(task)

    def poll(self) -> None:
        """Give idle workers tasks and take what is done; never waits. A worker gets one task a call. Raises as `report` does."""
        self._work(until_done=False)

    def report(self) -> GradingReport:
        """Wait for the rest; the verdicts in the order in which the tasks were added. Raises as GradingPool.grade_many does, and
        GradingError after an earlier `report`, an `abandon` or the end of the pool."""
        self._work(until_done=True)
        self._end()
        return self._call.report(self._pool._function)

    def abandon(self) -> None:
        """Give up what has no verdict yet and free the pool; workers that are busy with it are replaced. Nothing after `report`."""
        if self._ended:
            return
        try:
            self._pool._stop_tasks()
        finally:
            self._end()

    def __enter__(self) -> OpenGrading:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon()

    def _work(self, *, until_done: bool) -> None:
        if self._ended:
            raise GradingError("this grading has ended, by its report, by abandon or by an error: open another with GradingPool.open")
        if not self._pool._finalizer.alive:
            self._end()
            raise GradingError("the grading pool is closed: it was closed while this grading went on")
        try:
            self._pool._work(self._call, until_done=until_done)
        except BaseException:
            self._pool.close()  # workers may be half-way through this call's tasks
            self._end()
            raise

    def _end(self) -> None:
        self._ended = True
        self._pool._lock.release()


class _Call:
    """The state of one grading."""

    def __init__(self) -> None:
        self.tasks: list[GradingTask] = []
        self.waiting: deque[int] = deque()
        self.open = 0
        """Tasks without a verdict yet."""
        self.verdicts: list[Verdict | None] = []
        self.timeouts = 0
        self.crashes = 0
        self.traces: list[str] = []

    def add(self, task: GradingTask) -> None:
        self.waiting.append(len(self.tasks))
        self.tasks.append(task)
        self.verdicts.append(None)
        self.open += 1

    def settle(self, index: int, verdict: Verdict) -> None:
        assert self.verdicts[index] is None, f"answer {index} was graded twice"
        self.verdicts[index] = verdict
        self.open -= 1

    def fail(self, index: int, *, timeout: bool = False, trace: str | None = None) -> None:
        self.settle(index, Verdict(reward=0.0, outcome=TIMEOUT if timeout else CRASH))
        if timeout:
            self.timeouts += 1
        else:
            self.crashes += 1
        if trace is not None:
            self.traces.append(trace)

    def report(self, function: str) -> GradingReport:
        if self.traces and len(self.traces) == len(self.tasks):
            raise GradingError(
                f"grading function {function!r} raised on every one of {len(self.tasks)} answers; the first:\n{self.traces[0]}"
            )
        if self.traces:
            logger.warning("grading function %r raised on %d of %d answers, which score 0; the first:\n%s",
                           function, len(self.traces), len(self.tasks), self.traces[0])  # fmt: skip
        return GradingReport(verdicts=tuple(self.verdicts), timeouts=self.timeouts, crashes=self.crashes)


def _kill_all(workers: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner: the workers are not its own
    for worker in workers:
        worker.kill()
    workers.clear()
