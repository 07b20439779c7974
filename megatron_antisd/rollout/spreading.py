"""Which replica of an engine takes which requests, in which order, and when a replica with a quota is done. Pure: every rank computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_antisd.rollout.engine import EngineError, Quota, Request


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one replica does."""

    indices: tuple[int, ...]
    """Which requests of all, in the order in which they should start."""
    quota: int | None
    """Groups of consecutive `indices` after which the replica stops; None: all."""


def spread(requests: Sequence[Request], replicas: int, quota: Quota | None = None) -> list[Part]:
    """The part of each replica.

    Where no request knows its expected length: contiguous parts, so that most groups share their prompt's cache. Else groups go one after the other
    to the replica that has the least to decode, those of unknown length first, then the longest, and in that order they start. With a
    `quota` groups stay whole, and a replica's share of it is proportional to its groups: it stops by itself, and no replica asks another.
    Raises EngineError for requests that are not whole groups, or fewer groups than the quota.
    """
    count = len(requests)
    if quota is not None and (count % quota.group_size or not 0 < quota.groups * quota.group_size <= count):
        raise EngineError(f"a quota of {quota.groups} groups of {quota.group_size} needs at least as many requests, and whole groups; got {count}")
    if any(request.expected_tokens is not None for request in requests):
        parts = _balanced(requests, replicas, _groups(requests, replicas, quota))
    else:
        size = 1 if quota is None else quota.group_size
        bounds = [size * (count // size * i // replicas) for i in range(replicas + 1)]
        parts = [tuple(range(bounds[i], bounds[i + 1])) for i in range(replicas)]
    if quota is None:
        return [Part(indices=part, quota=None) for part in parts]
    # Rounded on the running count, so that shares add up to the quota and none exceeds its replica's groups.
    ends, started = [0], 0
    for part in parts:
        started += len(part)
        ends.append(quota.groups * started // count)
    return [Part(indices=part, quota=ends[i + 1] - ends[i]) for i, part in enumerate(parts)]


def _groups(requests: Sequence[Request], replicas: int, quota: Quota | None) -> list[range]:
    """What goes to a replica together: groups by the quota, or neighbours with the same prompt, or single requests where those are too few."""
    if quota is not None:
        return [range(start, start + quota.group_size) for start in range(0, len(requests), quota.group_size)]
    found, start = [], 0
    for _, run in groupby(requests, key=lambda request: request.prompt_ids):
        end = start + sum(1 for _ in run)
        found.append(range(start, end))
        start = end
    return found if len(found) >= replicas else [range(i, i + 1) for i in range(len(requests))]


def _balanced(requests: Sequence[Request], replicas: int, groups: Sequence[range]) -> list[tuple[int, ...]]:
    """Longest first to the least loaded. An unknown length counts as the longest known: it must not be the one that starts last."""
    longest = max(request.expected_tokens or 0 for request in requests)
    expected = [[requests[i].expected_tokens for i in group] for group in groups]
    load = [sum(longest if tokens is None else tokens for tokens in each) for each in expected]
    order = sorted(range(len(groups)), key=lambda g: (all(tokens is not None for tokens in expected[g]), -load[g], g))
    parts: list[list[int]] = [[] for _ in range(replicas)]
    total = [0] * replicas
    for group in order:
        least = min(range(replicas), key=lambda r: (total[r], r))
        parts[least].extend(groups[group])
        total[least] += load[group]
    return [tuple(part) for part in parts]


class GroupCount:
    """Counts complete groups of a replica's places 0 .. `requests` - 1 until there are `quota`; without one it never ends early."""

    def __init__(self, requests: int, *, group_size: int, quota: int | None) -> None:
        self._quota, self._size = quota, group_size
        self._left = [group_size] * (requests // group_size) if quota is not None else []
        self._complete: list[int] = []

    def add(self, places: Iterable[int]) -> None:
        """Responses that ended in the same decoding step; of groups that it completes the first count, by their places."""
        for place in sorted(places) if self._quota is not None else ():
            group = place // self._size
            self._left[group] -= 1
            if not self._left[group] and len(self._complete) < (self._quota or 0):
                self._complete.append(group)

    @property
    def met(self) -> bool:
        return self._quota is not None and len(self._complete) >= self._quota

    def keeps(self, place: int) -> bool:
        """Whether the response belongs to what the replica hands back."""
        return self._quota is None or place // self._size in self._complete
