"""Grading in worker processes with real wall-clock time-outs.

An answer that hangs (a loop, an endless simplification inside C code) or kills its process costs that one answer: the
worker is killed and replaced, the reward is 0.0 and the report counts it. No signals inside the worker, no threads in
the parent: one loop waits on the pipes of all workers, so the pool works in every rank under torchrun.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from multiprocessing.connection import wait
from types import TracebackType

from megatron_antisd.grading.call import Call
from megatron_antisd.grading.process import START_SECONDS, Worker
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.grading.verdict import GradingError, GradingPoolDied, GradingReport, GradingTask
from megatron_antisd.grading.worker import FAILED_START, INVALID, MATH_FUNCTION, RAISED, READY, VERDICT, WorkerSettings

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3
"""Workers that may be lost in a row without having graded anything (while starting or idle) before the pool gives up."""

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
DEFAULT_MEMORY_BYTES = 4 << 30


class GradingPool:
    """`workers` processes that grade, `timeout_seconds` of wall clock for each answer and `memory_bytes` of address space each.

    `function` is a dotted path `package.module:function` with the signature `(response: str, answer: str) -> float`, or
    `-> (float, feedback)`. It is loaded in the workers only, before the constructor returns. None: a task with tests goes to the code
    grader, which needs `sandbox` and has that one's deadline instead of `timeout_seconds`; any other task goes to the math grader.

    A pool whose workers die again and again is started anew by `rebuild`, `max_rebuilds` times at most; `grade_many` does so by itself.

    Raises GradingError when the function cannot be loaded, GradingPoolDied when the workers do not live until they have loaded it. Use as a
    context manager or call `close`; at the latest the workers end with the pool's owner.
    """

    def __init__(self, workers: int, timeout_seconds: float, function: str | None = None, *,
                 memory_bytes: int | None = DEFAULT_MEMORY_BYTES, sandbox: SandboxSettings | None = None, max_rebuilds: int = 0) -> None:
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
        self._size, self._max_rebuilds = workers, max_rebuilds
        self._rebuilds, self._counted = 0, 0
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._lost = 0
        self._workers: list[Worker] = []
        self._finalizer = weakref.finalize(self, _kill_all, self._workers, os.getpid())
        try:
            for _ in range(self._size):
                self._workers.append(Worker(self._settings))
            while not all(worker.ready for worker in self._workers):
                self._await_messages(Call())
        except BaseException:
            self.close()
            raise

    def rebuild(self, death: GradingPoolDied) -> None:
        """All workers anew after `death`. Raises GradingError where that was done `max_rebuilds` times already or the function cannot be loaded."""
        with self._lock:
            while True:
                if self._rebuilds >= self._max_rebuilds:
                    times = "once" if self._rebuilds == 0 else f"{self._rebuilds + 1} times"
                    raise GradingError(f"the grading pool died {times} in this process, and grading.max_rebuilds={self._max_rebuilds}; "
                                       f"the last death: {death}") from death
                self._rebuilds += 1
                logger.warning("rebuilding the grading pool (%d of at most %d times): %s", self._rebuilds, self._max_rebuilds, death)
                self.close()
                try:
                    return self._start()
                except GradingPoolDied as again:
                    death = again

    def take_rebuilds(self) -> int:
        """Rebuilds since the last call."""
        new, self._counted = self._rebuilds - self._counted, self._rebuilds
        return new

    def grade_many(self, tasks: Sequence[GradingTask]) -> GradingReport:
        """Grade the tasks; the verdicts come in their order. Safe to call from any thread, one call at a time. A pool that dies is rebuilt, and
        all tasks are graded again.

        Raises GradingError when the function returns something other than a finite number (and a feedback string), when it raises on
        every task, when a task's tests are broken (a broken grader must not look like a policy that solves nothing), and as `rebuild` does.
        """
        while True:
            grading = self.open()
            for task in tasks:
                grading.add(task)
            try:
                return grading.report()
            except GradingPoolDied as error:
                death = error
            self.rebuild(death)

    def open(self) -> OpenGrading:
        """Grade tasks as they come; the caller ends it with `report` or `abandon`, and until then nobody else grades with this pool. One that is
        dropped is abandoned."""
        self._lock.acquire()
        if not self._finalizer.alive:
            self._lock.release()
            raise GradingError("the grading pool is closed")
        return OpenGrading(self)

    def _work(self, call: Call, *, until_done: bool) -> None:
        """Hand out and receive: all that is possible now, or until every task has a verdict."""
        self._hand_out(call)
        if not until_done and any(not worker.ready or worker.index is not None for worker in self._workers):
            self._await_messages(call, patience=0.0)
            self._hand_out(call)
        while until_done and call.open:
            self._await_messages(call)
            self._hand_out(call)

    def _stop_tasks(self, indices: Collection[int] | None = None) -> None:
        """Those that workers are busy with; None: whichever they are."""
        for slot, worker in enumerate(self._workers):
            if worker.index is not None and (indices is None or worker.index in indices):
                self._replace(slot, None)

    def close(self) -> None:
        """Kill the workers. Idempotent."""
        self._finalizer()

    def __enter__(self) -> GradingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _hand_out(self, call: Call) -> None:
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

    def _await_messages(self, call: Call, patience: float | None = None) -> None:
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

    def _receive(self, slot: int, worker: Worker, call: Call) -> None:
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
                raise GradingPoolDied(
                    f"{self._lost} grading workers in a row died without an answer, the last {lost} with exit code {code} "
                    "(-9: killed, perhaps out of memory); their own messages are on stderr"
                )
        self._workers[slot] = Worker(self._settings)
        return code


class OpenGrading:
    """Tasks that are graded while others are still being made: `add` them, `poll` now and then, `report` at the end. Every method raises
    GradingPoolDied where the workers die again and again: this grading has ended then, and the pool is closed until it is rebuilt.

    Whoever may fail before the report calls `abandon` then, or uses this as a context manager, so that the pool is free for the next.
    """

    def __init__(self, pool: GradingPool) -> None:
        self._pool, self._call, self._ended = pool, Call(), False
        self._dropped = weakref.finalize(self, _end_dropped, pool)
        self._dropped.atexit = False

    def add(self, task: GradingTask) -> None:
        self._call.add(task)

    def poll(self) -> None:
        """Give idle workers tasks and take what is done; never waits. A worker gets one task a call. Raises as `report` does."""
        self._work(until_done=False)

    def keep(self, indices: Collection[int]) -> None:
        """Give up all tasks but these, by the order in which they were added: they are not waited for and stand in no report; workers that are busy
        with one are replaced."""
        self._call.keep(indices)
        self._pool._stop_tasks(self._call.dropped)

    def report(self) -> GradingReport:
        """Wait for the rest; the verdicts of what is kept, in the order in which the tasks were added. Raises as GradingPool.grade_many does, and
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
        self._dropped.detach()
        self._pool._lock.release()


def _end_dropped(pool: GradingPool) -> None:
    """A grading that nobody can end any more."""
    logger.warning("a grading was dropped without report or abandon; what had no verdict yet is given up")
    try:
        pool._stop_tasks()
    except GradingError:
        pool.close()  # the next one says so
    finally:
        pool._lock.release()


def _kill_all(workers: list[Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner: the workers are not its own
    for worker in workers:
        worker.kill()
    workers.clear()
