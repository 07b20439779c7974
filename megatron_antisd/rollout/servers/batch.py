"""Responses under way: what is drawn of each so far, and by which weights."""

from __future__ import annotations

import dataclasses
import hashlib
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_antisd.rollout.engine import EngineError, EngineFailure, Generation, Request, Sampling

Spans = tuple[tuple[int, int], ...]
"""(policy version, number of tokens) of each stretch of a response."""


@dataclass(kw_only=True, eq=False)
class Response:
    """One response that is being drawn, maybe in several stretches. A stretch is a request of its own: the prompt with what is there already."""

    index: int
    """Place in its batch."""
    batch: Batch
    request: Request
    sampling: Sampling
    cuts: Spans | None = None
    """Where a replayed run cut it: how many tokens it may draw from each policy version. None: wherever it is stopped."""
    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    spans: Spans = ()
    last: Generation | None = None
    """The last stretch as it came back."""

    def may_run(self, version: int) -> bool:
        return self.cuts is None or self._cut(version) > self._drawn(version)

    def next_request(self, version: int) -> tuple[Request, Sampling]:
        """The stretch from here on, by the weights of `version`."""
        if not self.ids and self.cuts is None:
            return self.request, self.sampling
        room = self.sampling.max_new_tokens - len(self.ids)
        if self.cuts is not None:
            room = min(room, self._cut(version) - self._drawn(version))
        seed = continued_seed(self.request.seed, len(self.ids))
        request = dataclasses.replace(self.request, prompt_ids=self.request.prompt_ids + self.ids, seed=seed)
        return request, dataclasses.replace(self.sampling, max_new_tokens=room)

    def add(self, generation: Generation | None, version: int, *, stopped: bool) -> bool:
        """Take in a stretch; whether the response is complete."""
        if generation is None:
            return False
        self.ids, self.log_probs, self.last = self.ids + generation.response_ids, self.log_probs + generation.log_probs, generation
        drawn = len(generation.response_ids)
        if self.spans and self.spans[-1][0] == version:
            self.spans = (*self.spans[:-1], (version, self.spans[-1][1] + drawn))
        else:
            self.spans = (*self.spans, (version, drawn))
        return not stopped and (not generation.truncated or len(self.ids) >= self.sampling.max_new_tokens)

    def generation(self) -> Generation:
        """The whole response. What its last stretch says of the prompt holds for all of it: the ids of earlier ones were part of that prompt."""
        if self.last is None:
            raise EngineFailure(f"response {self.index} was called complete without a token")
        return dataclasses.replace(self.last, response_ids=self.ids, log_probs=self.log_probs, version_spans=self.spans)

    def is_lost(self, version: int) -> bool:
        """Whether a replay cannot come to its end any more: a cut of weights that are gone is not drawn, or all cuts are and there is no end."""
        return self.cuts is not None and (any(of < version and self._drawn(of) < tokens for of, tokens in self.cuts)
                                          or all(self._drawn(of) >= tokens for of, tokens in self.cuts))

    def _cut(self, version: int) -> int:
        return dict(self.cuts or ()).get(version, 0)

    def _drawn(self, version: int) -> int:
        return dict(self.spans).get(version, 0)


def continued_seed(seed: int, tokens: int) -> int:
    """Of the stretch that begins behind `tokens` tokens. At the beginning the response's own: its first tokens are those of one that is never cut."""
    if tokens == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{tokens}".encode(), digest_size=8).digest(), "big") >> 1


@dataclass(kw_only=True, eq=False)
class Batch:
    """Responses that are waited for together. `events` holds a response for each that is complete, or the error that ends them all."""

    responses: list[Response] = field(default_factory=list)
    events: queue.SimpleQueue[Response | EngineError] = field(default_factory=queue.SimpleQueue)
    urgent: bool = True
    """Whether somebody waits for it; others are drawn ahead."""
    withdrawn: bool = False
    """What comes back of it is dropped."""


def make_batch(requests: Mapping[int, Request], sampling: Sampling, cuts: Sequence[Spans] | None = None, *, urgent: bool = True) -> Batch:
    """`requests` by their places in the whole list of requests, which `cuts` follow too."""
    batch = Batch(urgent=urgent)
    batch.responses += [Response(index=index, batch=batch, request=request, sampling=sampling, cuts=None if cuts is None else cuts[index])
                        for index, request in requests.items()]
    return batch


def by_length(responses: Sequence[Response]) -> list[Response]:
    """The longest expected first, those of unknown length before all; else as they came."""
    return sorted(responses, key=lambda r: -(r.request.expected_tokens if r.request.expected_tokens is not None else r.sampling.max_new_tokens + 1))
