"""Where ranks post their records and the alarm: a few keys of the process group's store, over a connection of its own.

Under torchrun the store lives in the agent of the first node, not in rank 0, and outlives every rank. Nothing here is collective, and each
call is a question of microseconds to the store; none waits for another rank.
"""

from __future__ import annotations

import itertools

import torch.distributed as dist

from megatron_antisd.supervision.records import Alarm, RankRecord

_numbers = itertools.count()  # of the boards this process made: a run after another one in the same processes must not find its records


class Board:
    """All ranks make their boards in the same order. The store's methods raise torch.distributed.DistError when it cannot be reached."""

    def __init__(self, store: dist.Store, world_size: int) -> None:
        # The main thread may sit in a blocking call of the store, which holds the connection; hence a clone.
        self._store = dist.PrefixStore(f"supervision/{next(_numbers)}", store.clone())
        self._world_size = world_size

    def post(self, record: RankRecord) -> None:
        self._store.set(f"rank/{record.rank}", record.to_json())

    def record(self, rank: int) -> RankRecord | None:
        """None: it never posted one."""
        key = f"rank/{rank}"
        return RankRecord.from_json(self._store.get(key)) if self._store.check([key]) else None

    def records(self) -> dict[int, RankRecord]:
        """Of all ranks that ever posted one, in one read."""
        keys = [f"rank/{rank}" for rank in range(self._world_size)]
        if not self._store.check(keys):  # one is missing, and reading it would wait for it
            keys = [key for key in keys if self._store.check([key])]
        records = [RankRecord.from_json(text) for text in self._store.multi_get(keys)]
        return {record.rank: record for record in records}

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """The alarm that holds: this one, or the one that another rank raised before."""
        return Alarm.from_json(self._store.compare_set("alarm", "", alarm.to_json()))

    def alarm(self) -> Alarm | None:
        return Alarm.from_json(self._store.get("alarm")) if self._store.check(["alarm"]) else None

    def count_answer(self) -> None:
        """This rank heard the alarm, or has left and never will."""
        self._store.add("answers", 1)

    def all_answered(self) -> bool:
        return self._store.add("answers", 0) >= self._world_size

    def next_failure(self) -> int:
        """1 for the first rank that fails."""
        return self._store.add("failures", 1)

    def publish(self, report: str) -> None:
        self._store.set("report", report)

    def report(self) -> str | None:
        return self._store.get("report").decode() if self._store.check(["report"]) else None
