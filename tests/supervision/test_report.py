"""Who is named, on tables of records."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_antisd.supervision.records import Alarm, Collective, RankRecord
from megatron_antisd.supervision.report import MAX_NAMED, explain, name_suspects, ranks_text

ALARM = Alarm(rank=0, stage="generate", step=12, reason="time-out after 600 s")
GATHER = Collective(name="all_gather_object", caller="rollout/groups.py:60", number=40, inside=True, seconds=590)
AFTER_GATHER = dataclasses.replace(GATHER, number=39, inside=False, seconds=599)


def record(rank: int, **values: object) -> RankRecord:
    known = {"host": "b" if rank == 3 else "a", "pid": 70 + rank, "namespace": "n", "stage": "generate", "step": 12, "stage_seconds": 600.2,
             "stages": 88, "beat": 120, "heard": True, "collective": GATHER}
    return RankRecord(rank=rank, **{**known, **values})


def table(*records: RankRecord) -> dict[int, RankRecord]:
    return {each.rank: each for each in records}


def test_a_stuck_rank_the_others_wait_for() -> None:
    records = table(record(0), record(1), record(2), record(3, collective=AFTER_GATHER))
    assert explain(ALARM, records, 4).splitlines() == [
        "stage generate of step 12: rank 0: time-out after 600 s. rank 3 (host b, pid 73) is stuck in stage generate of step 12 since "
        "600 s; its last collective all_gather_object (rollout/groups.py:60, number 39): ended 599 s before; "
        "ranks 0-2 wait in all_gather_object (rollout/groups.py:60)",
        "  ranks 0-2: running, stage generate of step 12, in all_gather_object (rollout/groups.py:60, number 40)",
        "  rank 3: running, stage generate of step 12, after all_gather_object (rollout/groups.py:60, number 39)",
    ]


@pytest.mark.parametrize(("records", "world_size", "ranks", "kind"), [
    (table(record(0), record(1), record(2, heard=False, collective=AFTER_GATHER)), 3, (2,), "silent"),
    (table(record(0), record(2)), 3, (1,), "silent"),  # never posted
    (table(record(0, state="failed", failure="RuntimeError: Connection closed", failure_order=1), record(1, heard=False)), 2, (1,), "silent"),
    (table(record(0, state="failed", failure_order=2), record(1), record(2, state="failed", failure_order=1)), 3, (2,), "failed"),
    (table(record(0, state="failed", failure="RuntimeError: Timed out waiting 4000ms for recv", failure_order=1), record(1),
           record(2, collective=AFTER_GATHER)), 3, (2,), "outside"),  # the first to fail gave up waiting
    (table(record(0, state="failed", failure="RuntimeError: Timed out waiting", failure_order=1),
           record(1, stages=90, collective=AFTER_GATHER)), 2, (0,), "failed"),  # nobody is behind it
    (table(record(0, state="failed", failure="ValueError: no", failure_order=1), record(1, collective=AFTER_GATHER)), 2, (0,), "failed"),
    (table(record(0, state="failed", failure_order=1), record(1, state="ended", failure="SystemExit: no", heard=False)), 2, (1,), "left"),
    (table(record(0, stages=89, stage="grade"), record(1)), 2, (1,), "stage"),  # inside a collective, but one of an earlier stage
    (table(record(0), record(1, collective=None)), 2, (1,), "outside"),
    (table(record(0), record(1, collective=dataclasses.replace(GATHER, name="barrier", number=38))), 2, (1,), "collectives"),
    (table(record(0, collective=dataclasses.replace(AFTER_GATHER, number=40)), record(1, collective=AFTER_GATHER)), 2, (1,), "collectives"),  # NCCL
    (table(record(0), record(1)), 2, (), "nobody"),
    (table(record(0)), 1, (0,), "outside"),
    (table(record(0), record(1, state="ended", heard=False), record(2, collective=AFTER_GATHER)), 3, (2,), "outside"),  # a clean end is no fault
])
def test_suspects(records: dict[int, RankRecord], world_size: int, ranks: tuple[int, ...], kind: str) -> None:
    verdict = name_suspects(records, world_size)
    assert (verdict.ranks, verdict.kind) == (ranks, kind)


def test_a_dead_rank_is_told_from_a_silent_one() -> None:
    records = table(record(0), record(1, heard=False))
    assert "rank 1 (host a, pid 71) gives no sign of life" in explain(ALARM, records, 2)
    assert "rank 1 (host a, pid 71) is dead, its process is gone; last seen in stage generate of step 12" in explain(ALARM, records, 2, dead={1})
    assert "rank 1 has never given a sign of life" in explain(ALARM, table(record(0)), 2)


def test_nobody_behind_is_said() -> None:
    assert "no rank is behind the others" in explain(ALARM, table(record(0), record(1)), 2)


def test_a_thousand_ranks_of_which_many_are_silent_stay_readable() -> None:
    text = explain(ALARM, {rank: record(rank, heard=rank % 2 == 0) for rank in range(1000)}, 1000)
    assert text.count("gives no sign of life") == MAX_NAMED
    assert len(text.splitlines()) == 3


def test_ranges() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([2, 0, 1, 5]) == "ranks 0-2, 5"


def test_records_survive_the_store() -> None:
    assert RankRecord.from_json(record(3).to_json()) == record(3)
    assert RankRecord.from_json(record(3, collective=None).to_json()) == record(3, collective=None)
    assert Alarm.from_json(ALARM.to_json()) == ALARM
