"""Which ranks hold up the others: pure functions from the table of all ranks' records to names and sentences."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_antisd.supervision.records import Alarm, Collective, RankRecord

Kind = Literal["silent", "left", "failed", "stage", "outside", "collectives", "nobody"]

MAX_NAMED = 16
"""Suspects that are described one by one; of more, the others are named by number alone."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The ranks that the others wait for, and by what they stand out.

    `silent`: no sign of life since the alarm. `left`: ended by an exception that is no failure (SystemExit). `failed`: the first that
    failed by an exception. `stage`: in an earlier stage than others. `outside`: in the same stage, in no collective while others wait in
    one, or while the first to fail timed out. `collectives`: began fewer collectives than others. `nobody`: all ranks stand at the same place."""

    ranks: tuple[int, ...]
    kind: Kind


def name_suspects(records: Mapping[int, RankRecord], world_size: int) -> Verdict:
    """`records`: of the ranks that ever gave a sign of life, read when the living ones have had the time to hear the alarm."""
    silent = [rank for rank in range(world_size) if rank not in records or (records[rank].state == "running" and not records[rank].heard)]
    if silent:
        return Verdict(ranks=tuple(silent), kind="silent")
    left = [rank for rank, record in records.items() if record.state == "ended" and record.failure is not None]
    failed = sorted((record for record in records.values() if record.state == "failed"), key=lambda record: record.failure_order)
    stuck = [record for record in _outside([record for record in records.values() if record.state == "running"], all_too=True)
             if failed and _timed_out(failed[0]) and record.stages <= failed[0].stages]
    if stuck and not left:  # the first to fail gave up waiting for them
        return Verdict(ranks=tuple(sorted(record.rank for record in stuck)), kind="outside")
    if failed or left:  # a rank that left brings the others down with broken connections, so theirs are not the cause
        return Verdict(ranks=tuple(sorted(left)), kind="left") if left else Verdict(ranks=(failed[0].rank,), kind="failed")
    running = [record for record in records.values() if record.state == "running"]
    if len(running) == 1:
        return Verdict(ranks=(running[0].rank,), kind="outside")
    for kind, behind in (("stage", _fewest(running, [record.stages for record in running])),
                         ("outside", _outside(running)),
                         ("collectives", _fewest(running, [record.collective.number if record.collective else 0 for record in running]))):
        if behind:
            return Verdict(ranks=tuple(sorted(record.rank for record in behind)), kind=kind)
    return Verdict(ranks=(), kind="nobody")


def explain(alarm: Alarm, records: Mapping[int, RankRecord], world_size: int, dead: Collection[int] = ()) -> str:
    """The report: what happened, the suspects, those that wait for them, and where every rank is. `dead`: ranks whose process is known to be
    gone. Its first line says what a reader of one line must know."""
    verdict = name_suspects(records, world_size)
    suspects = [describe(rank, records.get(rank), dead) for rank in verdict.ranks[:MAX_NAMED]]
    if more := verdict.ranks[MAX_NAMED:]:
        suspects.append(f"and {ranks_text(more)}")
    if verdict.kind == "nobody":
        suspects = ["no rank is behind the others: look at the stacks, and for a slow or broken network, disk or device"]
    waiting = _waiting([record for rank, record in sorted(records.items()) if rank not in verdict.ranks])
    first = f"{place(alarm.stage, alarm.step)}: rank {alarm.rank}: {alarm.reason}. {'; '.join([*suspects, *waiting])}"
    return "\n".join([first, *(f"  {line}" for line in _table(records, world_size))])


def explain_alone(alarm: Alarm, own: RankRecord, watched: RankRecord | None, *, gone: bool) -> str:
    """The report of a rank that can no longer reach the store. `watched`: the last that it saw of the next rank; `gone`: its process is."""
    text = f"{place(alarm.stage, alarm.step)}: rank {alarm.rank}: {alarm.reason}. The store does not answer: its process (the first node's " \
           f"torchrun), that node or the network to it is gone, and nothing is known of other ranks"
    if watched is not None:
        text += f"; {describe(watched.rank, watched, {watched.rank})}" if gone else \
                f"; rank {watched.rank} (host {watched.host}, pid {watched.pid}) was last seen in {place(watched.stage, watched.step)}"
    return f"{text}\n  rank {own.rank}: {_standing(own)}"


def describe(rank: int, record: RankRecord | None, dead: Collection[int] = ()) -> str:
    """`rank 3 (host b, pid 77) is stuck in stage generate of step 12 since 600 s; its last collective ...`."""
    if record is None:
        return f"rank {rank} has never given a sign of life"
    who = f"rank {rank} (host {record.host}, pid {record.pid})"
    where = f"in {place(record.stage, record.step)}"
    last = _last_collective(record.collective)
    if record.state == "running" and not record.heard:
        state = "is dead, its process is gone" if rank in dead else "gives no sign of life: dead, stopped, cut off, or its interpreter held by C code"
        return f"{who} {state}; last seen {where}, {record.stage_seconds:.0f} s after its begin; {last}"
    if record.state == "running":
        return f"{who} is stuck {where} since {record.stage_seconds:.0f} s; {last}"
    return f"{who} {'failed' if record.state == 'failed' else 'ended'} {where}{f' by {record.failure}' if record.failure else ''}; {last}"


def place(stage: str, step: int | None) -> str:
    return f"stage {stage}" if step is None else f"stage {stage} of step {step}"


def ranks_text(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


def _fewest(running: list[RankRecord], numbers: list[int]) -> list[RankRecord]:
    """Those with the smallest number; none where all have the same."""
    if len(set(numbers)) < 2:
        return []
    return [record for record, number in zip(running, numbers, strict=True) if number == min(numbers)]


def _outside(running: list[RankRecord], *, all_too: bool = False) -> list[RankRecord]:
    """Those in no collective; none where all are in none, but with `all_too`."""
    outside = [record for record in running if record.collective is None or not record.collective.inside]
    return outside if all_too or len(outside) < len(running) else []


def _timed_out(record: RankRecord) -> bool:
    """Whether a rank failed because a collective took too long, in gloo's or NCCL's words."""
    return any(word in (record.failure or "").lower() for word in ("timed out", "timeout", "time-out"))


def _waiting(others: list[RankRecord]) -> list[str]:
    """`ranks 0-2 wait in all_gather_object (rollout/groups.py:60)`, one for each place."""
    groups: dict[tuple[str, str], list[int]] = {}
    for record in others:
        if record.state == "running" and record.collective is not None and record.collective.inside:
            groups.setdefault((record.collective.name, record.collective.caller), []).append(record.rank)
    return [f"{ranks_text(ranks)} {'wait' if len(ranks) > 1 else 'waits'} in {name} ({caller})" for (name, caller), ranks in groups.items()]


def _last_collective(collective: Collective | None) -> str:
    if collective is None:
        return "it began no collective"
    when = f"in it since {collective.seconds:.0f} s" if collective.inside else f"ended {collective.seconds:.0f} s before"
    return f"its last collective {collective.name} ({collective.caller}, number {collective.number}): {when}"


def _table(records: Mapping[int, RankRecord], world_size: int) -> list[str]:
    """One line for all ranks that are at the same place."""
    rows: dict[str, list[int]] = {}
    for rank in range(world_size):
        rows.setdefault(_standing(records.get(rank)), []).append(rank)
    return [f"{ranks_text(ranks)}: {text}" for text, ranks in rows.items()]


def _standing(record: RankRecord | None) -> str:
    if record is None:
        return "no sign of life, ever"
    state = record.state if record.state != "running" or record.heard else "silent"
    last = record.collective
    collective = "no collective yet" if last is None else f"{'in' if last.inside else 'after'} {last.name} ({last.caller}, number {last.number})"
    return f"{state}{f' by {record.failure}' if record.failure else ''}, {place(record.stage, record.step)}, {collective}"
