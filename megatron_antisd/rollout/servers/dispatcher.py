"""A rank's requests over the servers: spread by load and prefix, moved when a server goes, stopped and continued around new weights."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_antisd.rollout.engine import EngineError, EngineFailure
from megatron_antisd.rollout.servers.batch import Batch, Response
from megatron_antisd.rollout.servers.client import ServerClient, ServerLost, ServerRefused
from megatron_antisd.rollout.servers.messages import Collection, Job, Result, Stop, Submission

_log = logging.getLogger(__name__)
WAIT_SECONDS = 0.25
"""How long a call that collects results may wait: new requests for the same server wait as long at most."""
PREFIX = 64
"""Requests whose first so many tokens are equal go to one server, where the prompt is in the cache, as far as its share goes."""


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A response on its way."""

    response: Response
    version: int
    sent: float


@dataclass(kw_only=True, eq=False)
class _Link:
    """A server as this rank uses it."""

    client: ServerClient
    room: int
    """Requests it may have from this rank at once."""
    flight: dict[str, _Flight] = field(default_factory=dict)
    prefixes: set[tuple[int, ...]] = field(default_factory=set)
    acknowledged: int = 0
    usable: bool = True
    """Until it is lost or refuses; the next weights may bring it back."""
    sending: threading.Lock = field(default_factory=threading.Lock)
    """Held while requests are chosen and sent, so that a stop comes before or behind them."""


class Dispatcher:
    """The threads of one rank, one for each server. Nothing here is collective.

    Requests are sent while there is a version of weights: `pause` takes it away, `resume` gives the next one. No other client has the same `name`."""

    def __init__(self, name: str, life: str, *, request_seconds: float) -> None:
        self._name, self._life, self._request_seconds = name, life, request_seconds
        self._changed = threading.Condition()
        self._links: dict[str, _Link] = {}
        self._waiting: deque[Response] = deque()
        self._version: int | None = None
        self._urgent_only = False
        self._numbers = itertools.count(1)
        self._closed = False
        self._moved = 0

    # -- the rank's own thread

    def use(self, clients: Sequence[tuple[ServerClient, int]]) -> None:
        """The servers from now on, all with the present weights, each with the number of requests that it may have at once."""
        with self._changed:
            now = {client.record.identity for client, _ in clients}
            for identity in [each for each in self._links if each not in now]:
                self._lose(self._links.pop(identity), "it is not among the servers any more")
            for client, room in clients:
                link = self._links.get(client.record.identity)
                if link is None:
                    link = self._links[client.record.identity] = _Link(client=client, room=room)
                    threading.Thread(target=self._serve, args=(link,), name=f"server {client.record.url}", daemon=True).start()
                link.usable = True
            self._changed.notify_all()

    def submit(self, batch: Batch) -> None:
        with self._changed:
            self._waiting.extend(batch.responses)
            self._fail_without_servers("none has the present weights")
            self._changed.notify_all()

    def withdraw(self, batch: Batch) -> None:
        """Give up what is not complete."""
        with self._changed:
            self._waiting = deque(response for response in self._waiting if response.batch is not batch)
            links = [link for link in self._links.values() if link.usable]
        for link in links:
            with link.sending, self._changed:
                names = [name for name, flight in link.flight.items() if flight.response.batch is batch]
                for name in names:
                    del link.flight[name]
            if names:
                self._stop(link, names)

    def pause(self, *, wait: bool, seconds: float) -> None:
        """Send nothing more, and return when nothing is under way. What is under way is stopped, and kept as far as it came; or, with `wait`, waited
        for as long as it takes. A server that does not hand its requests back in `seconds` is lost."""
        with self._changed:
            self._version = None
            links = [link for link in self._links.values() if link.usable]
        for link in links if not wait else []:
            with link.sending:
                pass  # a request that was being sent is there now, and no other one follows
            self._stop(link, None)
        with self._changed:
            self._changed.wait_for(lambda: not any(link.flight for link in self._links.values()), None if wait else seconds)
            for link in self._links.values():
                if link.flight:
                    self._lose(link, f"it did not hand {len(link.flight)} requests back within {seconds:g} s")
                link.prefixes.clear()  # new weights empty the servers' caches

    def run_out(self) -> None:
        """Wait until nothing may be drawn by the present weights any more: for responses that are cut where another run cut them."""
        with self._changed:
            self._changed.wait_for(lambda: self._version is None or not self._usable() or not (
                any(link.flight for link in self._links.values()) or any(response.may_run(self._version) for response in self._waiting)))

    def resume(self, version: int, *, urgent_only: bool) -> None:
        """Send on, to be answered by weights of `version`; with `urgent_only` only batches that somebody waits for."""
        with self._changed:
            self._version, self._urgent_only = version, urgent_only
            self._fail_without_servers("none has the present weights")
            self._changed.notify_all()

    def lost(self) -> set[str]:
        """Identities of servers that cannot be used before the next weights, or at all."""
        with self._changed:
            return {identity for identity, link in self._links.items() if not link.usable}

    def take_moved(self) -> int:
        """Stretches that were begun anew elsewhere, since their server went: those since the last call."""
        with self._changed:
            moved, self._moved = self._moved, 0
        return moved

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _stop(self, link: _Link, names: Sequence[str] | None) -> None:
        try:
            link.client.stop(Stop(client=self._name, names=None if names is None else tuple(names)))
        except (ServerLost, ServerRefused) as error:
            with self._changed:
                self._lose(link, str(error))

    # -- a server's thread

    def _serve(self, link: _Link) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over(link) or link.flight or self._next_for(link))
                if self._over(link):
                    return
            jobs: list[Job] = []
            try:
                with link.sending:
                    jobs, version = self._take(link)
                    if jobs:
                        link.client.submit(Submission(client=self._name, life=self._life, version=version, jobs=tuple(jobs)))
                message = Collection(client=self._name, acknowledged=link.acknowledged, wait_seconds=WAIT_SECONDS)
                self._hand_in(link, link.client.collect(message).results)
            except (ServerLost, ServerRefused) as error:
                with self._changed:
                    self._lose(link, str(error))
            except EngineError as error:  # no server can do it
                with self._changed:
                    self._fail(error, [link.flight.pop(job.name).response for job in jobs if job.name in link.flight])

    def _over(self, link: _Link) -> bool:
        return self._closed or self._links.get(link.client.record.identity) is not link

    def _usable(self) -> list[_Link]:
        return [link for link in self._links.values() if link.usable]

    def _next_for(self, link: _Link) -> list[Response]:
        """What the server should be sent now, up to its share of all that is not complete: first of prompts that it has seen, then of those that no
        server has, then of others'."""
        version = self._version
        if version is None or not link.usable:
            return []
        usable = self._usable()
        ready = [response for response in self._waiting if self._is_ready(response, version, link, usable)]
        share = -(-(len(ready) + sum(len(each.flight) for each in usable)) // len(usable))
        room = min(link.room, share) - len(link.flight)
        if room <= 0:
            return []
        elsewhere = set().union(*(each.prefixes for each in usable if each is not link))

        def rank(response: Response) -> tuple[bool, int]:
            prefix = response.request.prompt_ids[:PREFIX]
            return not response.batch.urgent, 0 if prefix in link.prefixes else 2 if prefix in elsewhere else 1

        return sorted(ready, key=rank)[:room]

    def _is_ready(self, response: Response, version: int, link: _Link, usable: list[_Link]) -> bool:
        place = response.request.place
        return ((response.batch.urgent or not self._urgent_only) and response.may_run(version)
                and (place is None or usable[place % len(usable)] is link))

    def _take(self, link: _Link) -> tuple[list[Job], int]:
        with self._changed:
            version, jobs = -1 if self._version is None else self._version, []
            for response in self._next_for(link):
                self._waiting.remove(response)
                request, sampling = response.next_request(version)
                job = Job(name=f"{self._name}/{next(self._numbers)}", request=request, sampling=sampling)
                link.flight[job.name] = _Flight(response=response, version=version, sent=time.monotonic())
                link.prefixes.add(response.request.prompt_ids[:PREFIX])
                jobs.append(job)
            return jobs, version

    def _hand_in(self, link: _Link, results: Iterable[Result]) -> None:
        with self._changed:
            for result in results:
                link.acknowledged = max(link.acknowledged, result.number)
                flight = link.flight.pop(result.name, None)
                if flight is None:
                    continue  # given up, or moved elsewhere
                if flight.response.add(result.generation, flight.version, stopped=result.stopped):
                    flight.response.batch.events.put(flight.response)
                else:
                    self._waiting.append(flight.response)
            oldest = min((flight.sent for flight in link.flight.values()), default=None)
            if oldest is not None and time.monotonic() - oldest > self._request_seconds:
                self._lose(link, f"a request takes longer than servers.request_seconds={self._request_seconds:g}")
            self._changed.notify_all()

    def _lose(self, link: _Link, why: str) -> None:
        """Its requests go to the others, from where they stood before it."""
        if link.usable:
            _log.warning("%s is not used any more: %s", link.client.record.url, why)
        link.usable = False
        link.prefixes.clear()
        self._moved += len(link.flight)
        self._waiting.extendleft(flight.response for flight in reversed(link.flight.values()))
        link.flight.clear()
        self._fail_without_servers(why)
        self._changed.notify_all()

    def _fail_without_servers(self, why: str) -> None:
        if self._version is not None and self._waiting and not self._usable():
            self._fail(EngineFailure(f"no server is left; the last word: {why}"), list(self._waiting))
            self._waiting.clear()

    def _fail(self, error: EngineError, responses: Sequence[Response]) -> None:
        for batch in {id(response.batch): response.batch for response in responses}.values():
            batch.events.put(error)
