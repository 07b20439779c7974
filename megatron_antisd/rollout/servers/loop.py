"""The life of a server: one thread that decodes, between whose steps everything else is done."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from megatron_antisd.rollout.engine import EngineError, EngineFailure, Generation, check_requests
from megatron_antisd.rollout.servers.messages import Receive, Received, Result, Status, Stop, Submission
from megatron_antisd.rollout.vllm_replica import SyncBroken, VllmReplica

_log = logging.getLogger(__name__)
T = TypeVar("T")
IDLE_SECONDS = 0.5
LINGER_SECONDS = 3.0
"""For the last results of a server that drains to be collected."""


class Refused(RuntimeError):
    """The server cannot do this now; nothing is broken. `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


class Outbox:
    """Results of one client until it says that they arrived. Used by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: deque[Result] = deque()
        self._count = 0
        self.notify: Callable[[], None] = lambda: None
        """Called after each result, from the decoding thread."""

    def put(self, name: str, generation: Generation | None, *, stopped: bool) -> None:
        with self._lock:
            self._count += 1
            self._results.append(Result(number=self._count, name=name, generation=generation, stopped=stopped))
        self.notify()

    def clear(self) -> None:
        with self._lock:
            self._results.clear()

    def take(self, acknowledged: int) -> tuple[Result, ...]:
        """Those after number `acknowledged`; the others are forgotten."""
        with self._lock:
            while self._results and self._results[0].number <= acknowledged:
                self._results.popleft()
            return tuple(self._results)


class EngineLoop:
    """One replica and its requests. `run` is the main thread's; everything else may be called from another one."""

    def __init__(self, replica: VllmReplica, identity: str) -> None:
        self._replica, self._identity = replica, identity
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._clients: dict[str, str] = {}  # name of each request under way: its client
        self._boxes: dict[str, Outbox] = {}
        self._life, self._version, self._fault = "", None, ""
        self._steps, self._step_began = 0, None
        self._draining_until: float | None = None
        self._idle_since = time.monotonic()
        self._closed, self._ended = False, False

    # -- from other threads

    def ask(self, command: Callable[[], T]) -> Future[T]:
        """Run it between two decoding steps."""
        future: Future[T] = Future()
        self._commands.put((command, future))
        if self._ended:  # and nobody looks at what was put there since
            self._refuse_all()
        return future

    def box(self, client: str) -> Outbox:
        return self._boxes.setdefault(client, Outbox())

    def status(self) -> Status:
        began = self._step_began
        if self._fault:
            state = "failed"
        elif self._draining_until is not None:
            state = "draining"
        else:
            state = "unsynced" if self._version is None else "ready"
        return Status(identity=self._identity, state=state, life=self._life, version=self._version, running=len(self._clients), steps=self._steps,
                      step_seconds=None if began is None else time.monotonic() - began, fault=self._fault)

    def drain(self, seconds: float) -> None:
        """Take nothing new; end when all is done, or after `seconds`."""
        self._draining_until = time.monotonic() + seconds

    def close(self) -> None:
        self._closed = True

    # -- commands, in the decoding thread

    def submit(self, submission: Submission) -> None:
        """Raises Refused where the weights are not those asked for, EngineError for requests that cannot run."""
        self._require_ready(submission)
        jobs = submission.jobs
        for job in jobs:
            check_requests([job.request], job.sampling, max_context=self._replica.max_context, vocab_size=self._replica.vocab_size)
        for job in jobs:
            self._replica.add(job.name, job.request, job.sampling)
            self._clients[job.name] = submission.client

    def _require_ready(self, submission: Submission) -> None:
        status = self.status()
        if status.state != "ready":
            raise Refused(f"server {self._identity} is {status.state}" + (f": {status.fault}" if status.fault else ""),
                          503 if status.state == "draining" else 409)
        if (submission.life, submission.version) != (self._life, self._version):
            raise Refused(f"server {self._identity} holds version {self._version} of the weights"
                          f"{'' if submission.life == self._life else ' of another trainer'}, asked for {submission.version}")

    def stop(self, stop: Stop) -> int:
        """Returns the number of requests that were given up."""
        names = [name for name, client in self._clients.items()
                 if stop.client in (None, client) and (stop.names is None or name in stop.names)]
        for name, generation in self._replica.stop(names).items():
            client = self._clients.pop(name)
            if stop.client is not None:
                self.box(client).put(name, generation, stopped=True)
        return len(names)

    def receive(self, message: Receive) -> Received:
        """New weights. Raises Refused while requests are under way, and where the transfer broke off: the old ones then stay, or, where some are new
        already, the server has none until they are sent again."""
        if self._clients:
            raise Refused(f"server {self._identity} has {len(self._clients)} requests under way; stop them before new weights")
        for box in self._boxes.values():
            box.clear()  # nobody waits for anything that the old weights drew
        try:
            replies = self._replica.receive_weights(message.specification)
        except SyncBroken as error:
            if error.torn:
                self._version = None
            raise Refused(f"server {self._identity}: {error}") from error
        self._life, self._version = message.life, message.version
        return Received(version=message.version, replies=tuple(replies))

    # -- the main thread

    def run(self) -> None:
        """Until it is closed or drained. Raises what the engine raises: the process should end then."""
        try:
            while not self._over():
                with self._replica.decoding():
                    self._serve_commands()
                    while self._clients and not self._over() and self._commands.empty():
                        self._step()
        except BaseException as error:
            self._fault = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._ended = True
            self._refuse_all()

    def _over(self) -> bool:
        if self._clients or self._draining_until is None:
            self._idle_since = time.monotonic()
        end = self._draining_until
        return self._closed or (end is not None and (time.monotonic() >= end or time.monotonic() - self._idle_since > LINGER_SECONDS))

    def _step(self) -> None:
        self._step_began = time.monotonic()
        done = self._replica.step()
        self._steps, self._step_began = self._steps + 1, None
        for name, generation in done.items():
            self.box(self._clients.pop(name)).put(name, generation, stopped=False)

    def _serve_commands(self) -> None:
        """All there are; where there are none and nothing is decoded, wait a little for one."""
        wait = not self._clients
        while True:
            try:
                command, future = self._commands.get(timeout=IDLE_SECONDS) if wait else self._commands.get_nowait()
            except queue.Empty:
                return
            wait = False
            try:
                future.set_result(command())
            except (Refused, EngineError) as error:
                future.set_exception(error)
                if isinstance(error, EngineFailure):
                    raise
            except Exception as error:  # the caller hears of it, and the process ends: the engine's state is unknown
                future.set_exception(error)
                raise

    def _refuse_all(self) -> None:
        while True:
            try:
                _, future = self._commands.get_nowait()
            except queue.Empty:
                return
            future.set_exception(Refused(f"server {self._identity} has ended" + (f": {self._fault}" if self._fault else ""), 503))
