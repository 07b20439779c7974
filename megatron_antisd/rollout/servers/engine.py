"""The engine protocol over servers: every rank of the trainer asks for its share of the responses, and rank 0 sees to the servers themselves."""

from __future__ import annotations

import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch

from megatron_antisd.config import RunConfig
from megatron_antisd.rollout.engine import EngineError, EngineFailure, Finished, Generation, Quota, Request, Sampling, check_requests
from megatron_antisd.rollout.ranks import Ranks
from megatron_antisd.rollout.servers.batch import Batch, Response, Spans, make_batch
from megatron_antisd.rollout.servers.client import ServerClient, ServerLost, ServerRefused
from megatron_antisd.rollout.servers.dispatcher import Dispatcher
from megatron_antisd.rollout.servers.meeting import POLL_SECONDS, Directory, ServerRecord, why_refused
from megatron_antisd.rollout.servers.messages import Receive, Stop
from megatron_antisd.rollout.spreading import GroupCount, Part, spread

_log = logging.getLogger(__name__)
T = TypeVar("T")
POLL_EVENTS_SECONDS = 0.1
FORGET_SECONDS = 900.0
"""After which a server that does not answer is not asked any more: its node is gone, or it was started again and comes as another one."""


@dataclass(kw_only=True, eq=False)
class Pending:
    """Responses that are drawn while something else is done."""

    batch: Batch
    parts: list[Part]
    requests: int
    group_size: int


class ServersEngine:
    """vLLM servers that the ranks share. Collective but for what the docstrings say."""

    policy_version: int

    def __init__(self, config: RunConfig, token: bytes, directory: Directory | None, *, model: dict[str, Any], vocab_size: int, max_context: int,
                 send: SendWeights, routes: bool, wanted: int, policy_version: int = 0) -> None:
        """`directory` on rank 0 alone; it outlives this engine. `model`: see meeting.essential. Waits for `wanted` servers. Raises EngineError where
        they do not come within `servers.start_seconds`."""
        self._config, self._token, self._directory = config, token, directory
        self._model, self.max_context, self._vocab_size, self._routes = model, max_context, vocab_size, routes
        self._send = send
        self.policy_version = policy_version
        self._ranks = Ranks(timedelta(seconds=config.collective_seconds))
        self._life = self._ranks.from_main(directory.life if directory is not None else None)
        self._members: dict[str, ServerRecord] = {}
        self._clients: dict[str, ServerClient] = {}
        self._closed, self._moved = False, 0
        self._dispatcher = Dispatcher(f"{self._life}/{self._ranks.rank}", self._life, request_seconds=config.servers.request_seconds,
                                      stall_seconds=config.rollout.stall_seconds + config.servers.silence_seconds)
        self._absent: dict[str, float] = {}  # since when each server does not answer
        try:
            self._ranks.together("start", lambda: self._wait_for_servers(wanted))
        except EngineError:
            self.close()
            raise

    @property
    def replicas(self) -> int:
        """Servers with the present weights."""
        return len(self._members)

    # -- generation

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        """See Engine.generate."""
        return self.complete(self.begin(requests, sampling, quota=quota), finished)

    def begin(self, requests: Sequence[Request], sampling: Sampling, *, quota: Quota | None = None, cuts: Sequence[Spans] | None = None,
              ahead: bool = False) -> Pending:
        """Start to draw. With `ahead` others go first, and nothing is sent between `load_weights` and `go_on`. `cuts`: see Response. Raises
        EngineError."""
        self._ranks.require_agreement(zlib.crc32(repr((sampling, quota, requests)).encode()))
        check_requests(requests, sampling, max_context=self.max_context, vocab_size=self._vocab_size)
        parts = spread(requests, self._ranks.world, quota)
        mine = parts[self._ranks.rank]
        batch = make_batch({index: requests[index] for index in mine.indices}, sampling, cuts, urgent=not ahead)
        self._dispatcher.submit(batch)
        return Pending(batch=batch, parts=parts, requests=len(requests), group_size=1 if quota is None else quota.group_size)

    def complete(self, pending: Pending, finished: Finished | None = None) -> list[Generation | None]:
        """Wait for what was begun. Raises as Engine.generate."""
        self._dispatcher.hurry(pending.batch)
        shares = self._ranks.together("generate", lambda: (self._collect(pending, finished), self._dispatcher.take_moved()))
        results: list[Generation | None] = [None] * pending.requests
        for share, moved in shares:
            self._moved += moved
            for index, generation in share.items():
                results[index] = generation
        return results

    def withdraw(self, pending: Pending) -> None:
        """Give up what was begun. Not collective."""
        self._dispatcher.withdraw(pending.batch)

    def _collect(self, pending: Pending, finished: Finished | None) -> dict[int, Generation | None]:
        """This rank's share, in the order in which responses are complete."""
        part, done = pending.parts[self._ranks.rank], {}
        places = {index: place for place, index in enumerate(part.indices)}
        count = GroupCount(len(part.indices), group_size=pending.group_size, quota=part.quota)
        while len(done) < len(part.indices) and not count.met:
            new: list[Response] = []
            for event in self._events(pending.batch):
                if isinstance(event, EngineError):
                    self._dispatcher.withdraw(pending.batch)
                    raise event
                new.append(event)
            done |= {response.index: response.generation() for response in new}
            count.add(places[response.index] for response in new)
            if finished is not None:
                finished([(response.index, done[response.index].response_ids) for response in new])
        if len(done) < len(part.indices):
            self._dispatcher.withdraw(pending.batch)
        return {index: done[index] if count.keeps(place) else None for index, place in places.items()}

    def _events(self, batch: Batch) -> list[Response | EngineError]:
        """All there are; waits a little for the first one."""
        found: list[Response | EngineError] = []
        try:
            found.append(batch.events.get(timeout=POLL_EVENTS_SECONDS))
            while True:
                found.append(batch.events.get_nowait())
        except queue.Empty:
            return found

    # -- weights

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> None:
        """See Engine.load_weights; the weights go from rank to rank by `send`, which compares checksums itself: `stream` is not begun. What is being
        drawn is cut; it goes on with the new ones, what is drawn ahead only after `go_on`. A server that fails is left out until the next
        weights; EngineFailure where none is left."""
        config = self._config
        replays = config.asynchrony.replay is not None
        if replays:
            self._dispatcher.run_out()
        self._dispatcher.pause(wait=config.asynchrony.partial == "finish" and not replays, seconds=config.servers.silence_seconds)
        members = self._ranks.together("find servers", self._present_members)[0]
        if not members:
            raise EngineFailure("load_weights: no server is left")
        failed = self._send(members, version, self._tell)
        for record in members:
            if record.identity in failed and self._ranks.rank == 0:
                _log.warning("server %s did not take version %d of the weights and is left out until the next: %s", record.url, version,
                             failed[record.identity])
        self._members = {record.identity: record for record in members if record.identity not in failed}
        if not self._members:
            raise EngineFailure("load_weights failed on all servers: " + "; ".join(failed.values()))
        room = max(1, -(-config.rollout.max_sequences // self._ranks.world))
        self._dispatcher.use([(self._client(record), room) for record in self._members.values()])
        for identity in self._clients.keys() - self._members.keys():
            self._clients.pop(identity).close()
        self.policy_version = version
        self._dispatcher.resume(version, urgent_only=True)

    def go_on(self) -> None:
        """Send what is drawn ahead, too. Not collective."""
        self._dispatcher.resume(self.policy_version, urgent_only=False)

    def _tell(self, specifications: Mapping[str, dict[str, Any]], version: int, seconds: float) -> dict[str, Future[tuple[dict[str, Any], ...]]]:
        """Rank 0's: have each server, by identity, receive. What the engine ranks of each report, or why they do not, as soon as it is known."""
        def tell(identity: str) -> tuple[dict[str, Any], ...]:
            client = self._clients[identity]
            client.stop(Stop(client=None))  # what clients that are gone left behind: those that are here have paused
            return client.receive(Receive(life=self._life, version=version, specification=specifications[identity]), seconds).replies

        return {identity: in_thread(partial(tell, identity)) for identity in specifications}

    # -- servers

    def _wait_for_servers(self, count: int) -> None:
        """Rank 0's."""
        if self._directory is None:
            return
        settings, end = self._config.servers, time.monotonic() + self._config.servers.start_seconds
        while len(present := self._present_members()) < count:
            if time.monotonic() > end:
                raise EngineError(f"{len(present)} of {count} servers (servers.count) that fit this run came to {settings.store} within "
                                  f"servers.start_seconds={settings.start_seconds:g}; start them with: python -m megatron_antisd.serve CONFIG.yaml")
            time.sleep(POLL_SECONDS)

    def _present_members(self) -> list[ServerRecord]:
        """Rank 0's: the servers that fit and answer, new ones among them. One that does not is asked again the next time, for some minutes."""
        if self._directory is None:
            return []
        records = [record for record in self._directory.records() if self._fits(record)]
        asked = {record.identity: in_thread(partial(self._client(record).status, briefly=record.identity in self._absent)) for record in records}
        present = []
        for record in records:
            try:
                if asked[record.identity].result().state in ("ready", "unsynced"):
                    present.append(record)
                self._absent.pop(record.identity, None)
            except (ServerLost, ServerRefused, EngineError) as error:
                if record.identity not in self._absent:
                    _log.warning("server %s is gone: %s", record.url, error)
                since = self._absent.setdefault(record.identity, time.monotonic())
                if time.monotonic() - since > FORGET_SECONDS:
                    self._directory.forget(record)
        return present

    def _fits(self, record: ServerRecord) -> bool:
        """One that does not is named once."""
        if record.identity in self._clients or record.identity in self._absent:
            return True
        why = why_refused(record, self._config, self._model, self.max_context, routes=self._routes)
        _log.log(logging.ERROR if why else logging.INFO, "server %s %s", record.url, f"is not used: {why}" if why else "is there")
        if why:
            self._directory.forget(record)
        return not why

    def _client(self, record: ServerRecord) -> ServerClient:
        if record.identity not in self._clients:
            self._clients[record.identity] = ServerClient(record, self._token, silence_seconds=self._config.servers.silence_seconds,
                                                          step_seconds=self._config.rollout.stall_seconds)
        return self._clients[record.identity]

    # -- life cycle

    def sleep(self) -> None:
        """Nothing to give: the servers' memory is not the trainer's."""

    def wake(self) -> None:
        """See `sleep`."""

    def take_figures(self) -> dict[str, int]:
        """See Engine.take_figures."""
        moved, self._moved = self._moved, 0
        return {"servers": self.replicas, "requests_moved": moved}

    def close(self) -> None:
        """See Engine.close. The servers stay, without requests."""
        if self._closed:
            return
        self._closed = True
        self._dispatcher.pause(wait=False, seconds=5.0)
        self._dispatcher.close()
        for client in self._clients.values():
            client.close()
        self._ranks.close()


def in_thread(action: Callable[[], T]) -> Future[T]:
    """What it returns or raises, from a thread that does not hold up the process's end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="server call", daemon=True).start()
    return future


Tell = Callable[[Mapping[str, dict[str, Any]], int, float], dict[str, Future[tuple[dict[str, Any], ...]]]]
SendWeights = Callable[[list[ServerRecord], int, Tell], dict[str, str]]
"""(servers, version, tell) -> why each one failed that did, by identity; collective, the same on every rank."""
