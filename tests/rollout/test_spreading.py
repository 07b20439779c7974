"""Which replica takes which requests, and when it is done: by properties over many draws, and by hand."""

from __future__ import annotations

import random

import pytest

from megatron_antisd.rollout.engine import EngineError, Quota, Request
from megatron_antisd.rollout.spreading import GroupCount, spread


def requests_of(lengths: list[int | None], size: int = 1) -> list[Request]:
    """A group of `size` for each expected length."""
    return [Request(prompt_ids=(g,), seed=0, expected_tokens=tokens) for g, tokens in enumerate(lengths) for _ in range(size)]


def test_without_lengths_parts_are_contiguous() -> None:
    assert [p.indices for p in spread(requests_of([None] * 5), 2)] == [(0, 1), (2, 3, 4)]
    assert [(p.indices, p.quota) for p in spread(requests_of([None] * 3, 2), 2, Quota(groups=2, group_size=2))] == [((0, 1), 0), ((2, 3, 4, 5), 2)]
    assert [p.indices for p in spread([], 2)] == [(), ()]


def test_longest_first_to_the_least_loaded_and_unknown_ones_before() -> None:
    parts = spread(requests_of([5, 9, None, 1, 6], 2), 2)
    assert [p.indices for p in parts] == [(4, 5, 8, 9), (2, 3, 0, 1, 6, 7)]  # unknown counts as 9: 9 + 6 and 9 + 5 + 1


def test_fewer_groups_than_replicas_are_divided() -> None:
    assert sorted(len(p.indices) for p in spread(requests_of([7], 4), 2)) == [2, 2]


@pytest.mark.parametrize("seed", range(60))
def test_every_request_once_and_shares_that_can_be_met(seed: int) -> None:
    draw = random.Random(seed)
    size, groups, replicas = draw.randint(1, 4), draw.randint(1, 20), draw.randint(1, 9)
    lengths = [draw.choice([None, draw.randint(1, 99)]) if seed % 3 else None for _ in range(groups)]
    wanted = draw.randint(1, groups)
    parts = spread(requests_of(lengths, size), replicas, Quota(groups=wanted, group_size=size))
    assert sorted(i for p in parts for i in p.indices) == list(range(groups * size))
    assert sum(p.quota for p in parts) == wanted
    for part in parts:
        assert 0 <= part.quota <= len(part.indices) // size
        runs = [part.indices[i : i + size] for i in range(0, len(part.indices), size)]
        assert all(run == tuple(range(run[0], run[0] + size)) and run[0] % size == 0 for run in runs), "groups stay whole"
    if all(tokens is not None for tokens in lengths):
        load = [sum(lengths[i // size] for i in p.indices) for p in parts]
        assert max(load) - min(load) <= max(lengths) * size, "no replica could hand its last group to another and be better"


def test_what_is_no_quota_is_refused() -> None:
    for quota in (Quota(groups=3, group_size=2), Quota(groups=1, group_size=3), Quota(groups=0, group_size=2)):
        with pytest.raises(EngineError, match="needs at least as many requests, and whole groups; got 4"):
            spread(requests_of([None] * 4), 1, quota)


def test_groups_are_counted_when_their_last_response_ends() -> None:
    count = GroupCount(6, group_size=2, quota=2)
    count.add([0, 2, 4])
    assert not count.met and not any(count.keeps(place) for place in range(6))
    count.add([5])
    count.add([3, 1])  # two in one step, one too many: the first by its place
    assert count.met and [count.keeps(place) for place in range(6)] == [True, True, False, False, True, True]
    assert GroupCount(4, group_size=2, quota=0).met
    all_of_them = GroupCount(4, group_size=1, quota=None)
    all_of_them.add(range(4))
    assert not all_of_them.met and all(all_of_them.keeps(place) for place in range(4))
