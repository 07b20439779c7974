"""A rank's requests over the servers: spread by load and prefix, moved when a server goes, stopped and continued around new weights."""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from megatron_antisd.rollout.engine import EngineError, EngineFailure
from megatron_antisd.rollout.servers.batch import Batch, Response
from megatron_antisd.rollout.servers.client import ServerClient, ServerDrains, ServerLost, ServerRefused
from megatron_antisd.rollout.servers.messages import Collected, Collection, Job, Stop, Submission

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
    drains: bool = False
    """It finishes what it has."""
    era: int = 0
    """Raised with each set of weights: a call that began under an earlier one says nothing any more."""
    thread: threading.Thread | None = None
    sending: threading.Lock = field(default_factory=threading.Lock)
    """Held while requests are chosen and sent, so that a stop comes before or behind them."""


class Dispatcher:
    """The threads of one rank, one for each server. Nothing here is collective.

    Requests are sent while there is a version of weights: `pause` takes it away, `resume` gives the next one."""

    def __init__(self, name: str, life: str, *, request_seconds: float, stall_seconds: float) -> None:
        """`request_seconds`, `stall_seconds`: what a request and a decoding step may take."""
        # A server remembers results by its clients' names: one that comes after another on the same rank is another client.
        self._name, self._life = f"{name}/{uuid.uuid4().hex[:12]}", life
        self._request_seconds, self._stall_seconds = request_seconds, stall_seconds
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
                    link.thread = threading.Thread(target=self._serve, args=(link,), name=f"server {client.record.url}", daemon=True)
                    link.thread.start()
                link.usable, link.drains, link.era = True, False, link.era + 1
            self._changed.notify_all()

    def submit(self, batch: Batch) -> None:
        with self._changed:
            self._waiting.extend(batch.responses)
            self._fail_without_servers("none has the present weights")
            self._changed.notify_all()

    def hurry(self, batch: Batch) -> None:
        """Somebody waits for it now."""
        with self._changed:
            batch.urgent = True
            self._fail_without_servers("all are lost")
            self._changed.notify_all()

    def withdraw(self, batch: Batch) -> None:
        """Give up what is not complete."""
        with self._changed:
            batch.withdrawn = True
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

        def stop(link: _Link) -> None:
            with link.sending:
                pass  # a request that was being sent is there now, and no other one follows
            self._stop(link, None)

        if links and not wait:
            with ThreadPoolExecutor(len(links)) as pool:
                list(pool.map(stop, links))
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
            self._fail_lost_replays()
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
        for link in self._links.values():
            if link.thread is not None:
                link.thread.join(10 * WAIT_SECONDS)

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
                era = link.era
            jobs: list[Job] = []
            try:
                with link.sending:
                    jobs, version = self._take(link)
                    if jobs:
                        link.client.submit(Submission(client=self._name, life=self._life, version=version, jobs=tuple(jobs)))
                message = Collection(client=self._name, acknowledged=link.acknowledged, wait_seconds=WAIT_SECONDS)
                self._hand_in(link, link.client.collect(message))
            except ServerDrains:
                self._take_back(link, jobs)
            except EngineError as error:  # no server can do it
                with self._changed:
                    self._fail(error, [link.flight.pop(job.name).response for job in jobs if job.name in link.flight])
            except Exception as error:  # whatever it was, the requests must not stay with a server that nobody asks any more
                with self._changed:
                    if link.era == era:
                        self._lose(link, str(error) if isinstance(error, ServerLost | ServerRefused) else f"{type(error).__name__}: {error}")

    def _take_back(self, link: _Link, jobs: Sequence[Job]) -> None:
        """A server that drains did not take these; what it took before it finishes."""
        with self._changed:
            link.drains = True
            self._put_back([link.flight.pop(job.name).response for job in jobs if job.name in link.flight])
            self._fail_without_servers("it is asked to end")
            self._changed.notify_all()

    def _over(self, link: _Link) -> bool:
        return self._closed or self._links.get(link.client.record.identity) is not link

    def _usable(self) -> list[_Link]:
        return [link for link in self._links.values() if link.usable and not link.drains]

    def _next_for(self, link: _Link) -> list[Response]:
        """What the server should be sent now, up to its share of all that is not complete: first of prompts that it has seen, then of those that no
        server has, then of others'."""
        version = self._version
        if version is None or not link.usable or link.drains:
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

    def _hand_in(self, link: _Link, collected: Collected) -> None:
        with self._changed:
            for result in collected.results:
                link.acknowledged = max(link.acknowledged, result.number)
                flight = link.flight.pop(result.name, None)
                if flight is None:
                    continue  # given up, or moved elsewhere
                if flight.response.add(result.generation, flight.version, stopped=result.stopped):
                    flight.response.batch.events.put(flight.response)
                else:
                    self._waiting.append(flight.response)
            self._fail_lost_replays()
            if collected.step_seconds is not None and collected.step_seconds > self._stall_seconds:
                self._lose(link, f"a decoding step takes longer than rollout.stall_seconds={self._stall_seconds:g}")
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
        self._put_back([flight.response for flight in link.flight.values()])
        link.flight.clear()
        self._fail_without_servers(why)
        self._changed.notify_all()

    def _put_back(self, responses: Sequence[Response]) -> None:
        self._waiting.extendleft(response for response in reversed(responses) if not response.batch.withdrawn)

    def _fail_without_servers(self, why: str) -> None:
        """What is drawn ahead waits: the next weights may bring a server."""
        urgent = [response for response in self._waiting if response.batch.urgent]
        if self._version is not None and urgent and not self._usable():
            self._fail(EngineFailure(f"no server is left; the last word: {why}"), urgent)

    def _fail_lost_replays(self) -> None:
        version = self._version
        lost = [] if version is None else [response for response in self._waiting if response.is_lost(version)]
        if lost:
            self._fail(EngineError(f"asynchrony.replay: {len(lost)} responses cannot be drawn as they were: their tokens are others, or the run was "
                                   "interrupted, and weights that drew a part of them are gone; a replay goes through in one life, or begins again"),
                       lost)

    def _fail(self, error: EngineError, responses: Sequence[Response]) -> None:
        """Their batches end with it; nothing more of those is sent."""
        failed = {id(response.batch): response.batch for response in responses}
        self._waiting = deque(response for response in self._waiting if id(response.batch) not in failed)
        for batch in failed.values():
            batch.events.put(error)
