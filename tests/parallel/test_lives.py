"""The name that the ranks of one life agree on, in a store that remembers the lives before."""

from __future__ import annotations

import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_antisd.parallel.lives import agree_on_name

WORLD = 4
TIMEOUT = timedelta(seconds=30)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def come(pool: ThreadPoolExecutor, server: dist.TCPStore, rank: int, timeout: timedelta = TIMEOUT) -> Future[str]:
    """One rank, over a connection of its own."""
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
    return pool.submit(agree_on_name, client, rank, WORLD, timeout)


def test_each_life_has_its_own_name_whoever_died_in_the_one_before(server: dist.TCPStore) -> None:
    """Lives that all ranks reached, that rank 0 never reached, and that rank 2 never reached; with rank 0 first, and rank 0 last."""
    names = set()
    with ThreadPoolExecutor(WORLD) as pool:
        for order in ((0, 1, 2, 3), (3, 1, 2, 0), (2, 0, 3, 1)):
            came = [come(pool, server, rank) for rank in order]
            life = {each.result(60) for each in came}
            assert len(life) == 1, "all ranks have one name"
            names |= life
            for rank in (1, 3):  # they left their marks and died
                server.set(f"mark/{rank}", uuid.uuid4().hex)
    assert len(names) == 3, "no name was used before"


def test_a_mark_of_a_dead_rank_does_not_stand_for_the_living(server: dist.TCPStore) -> None:
    """Rank 0 answers it, and waits on for the rank itself."""
    server.set("mark/2", "of the dead")
    with ThreadPoolExecutor(WORLD) as pool:
        came = [come(pool, server, rank) for rank in (0, 1, 3)]
        server.wait(["answer/of the dead"], TIMEOUT)
        assert not came[0].done()
        came.append(come(pool, server, 2))
        assert len({each.result(60) for each in came}) == 1


def test_a_rank_that_does_not_come_is_named(server: dist.TCPStore) -> None:
    with ThreadPoolExecutor(WORLD) as pool:
        came = [come(pool, server, rank, timedelta(seconds=1)) for rank in (0, 1, 3)]
        with pytest.raises(dist.DistStoreError, match=r"ranks \[2\] did not come within 1 s \(parallel.timeout_seconds\)"):
            came[0].result(60)
