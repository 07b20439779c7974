"""A store that knows nothing of the ranks that were here before.

torchrun's agent keeps one store for all its restarts, and torch puts the keys of each into the same place: a rank that starts again may read the
address of a process that is gone, and wait for it for ever, or an alarm that ended the ranks before it. So the ranks of one life first agree on a
name that nobody used before. The number of restarts is no such name: agents of several nodes count each their own.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

ROOM = "megatron_antisd/lives"
POLL_SECONDS = 0.02


def store_of_this_life(timeout: timedelta) -> dist.Store | None:
    """The agent's store, under a prefix that the ranks of this life alone know. None where no agent keeps a store: rank 0 makes a new one then.
    All ranks call it. Raises torch.distributed.DistStoreError when not all are there in time."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"{ROOM}/{agree_on_name(dist.PrefixStore(ROOM, store), rank, world_size, timeout)}", store)


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Every rank leaves its mark, which no other process ever had, and waits for the answer to just that one. Rank 0 answers all marks, those of the
    dead too, until every living rank has confirmed."""
    if rank:
        mark = uuid.uuid4().hex
        store.set(f"mark/{rank}", mark)
        store.wait([f"answer/{mark}"], timeout)
        name = store.get(f"answer/{mark}").decode()
        store.set(f"confirmed/{name}/{rank}", "")
        return name
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing, answered = set(range(1, world_size)), set[str]()
    while missing:
        for other in sorted(missing):
            if store.check([f"confirmed/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"mark/{other}"]) and (mark := store.get(f"mark/{other}").decode()) not in answered:
                store.set(f"answer/{mark}", name)
                answered.add(mark)
        if missing and time.monotonic() > end:
            raise dist.DistStoreError(f"ranks {sorted(missing)} did not come within {timeout.total_seconds():g} s (parallel.timeout_seconds): they "
                                      "died while they started, or start more slowly than that")
        time.sleep(POLL_SECONDS if missing else 0)
    return name
