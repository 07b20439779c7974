"""The thread that gives signs of life, watches the next rank and this rank's own stage, and answers an alarm.

Every heartbeat it posts this rank's record and looks for an alarm. It raises one when this rank's stage is over its time-out, when the next
rank's process is gone or its record did not change for too long (by this rank's own clock), or when this rank fails by an exception.
An alarm ends every process: stacks first, then the report by the rank that raised the alarm and by rank 0, then the exit.
"""

from __future__ import annotations

import datetime
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_antisd.config.reliability import SupervisionConfig
from megatron_antisd.supervision import collectives, stacks
from megatron_antisd.supervision.board import Board
from megatron_antisd.supervision.exit_codes import EXIT_HANG
from megatron_antisd.supervision.records import Alarm, RankRecord
from megatron_antisd.supervision.report import explain, explain_alone, place

log = logging.getLogger(__name__)
T = TypeVar("T")

POLL_SECONDS = 0.1  # while an alarm is being answered
MAX_MESSAGE = 160  # characters of an exception, which others repeat; the rank itself prints all of it
STUCK_SECONDS = 20.0  # beyond all that answering an alarm waits for, on a machine that is too busy
REPORT_SECONDS = 3.0  # beyond two heartbeats, that a rank waits for the report of the one that raised the alarm


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    step: int | None
    limit: float
    """Seconds."""
    begun: float
    """By time.monotonic."""
    number: int


class Watchdog:
    """One a process. `stage` is set by the main thread as a whole and read by the watchdog's."""

    def __init__(self, config: SupervisionConfig, directory: Path, board: Board, rank: int, world_size: int, stage: Stage) -> None:
        self._config, self._directory, self._board = config, directory, board
        self._rank, self._world_size = rank, world_size
        self.stage = stage
        self._host, self._namespace = socket.gethostname(), _namespace()
        self._beat, self._heard = 0, False
        self._watched = (rank + 1) % world_size
        self._seen_beat, self._seen_at = -1, time.monotonic()
        self._last_seen: RankRecord | None = None  # the next rank's
        self._store_error: Exception | None = None  # a connection that is broken once stays so, and each further try prints a C++ stack
        self._store_lost_at = 0.0
        self._failure: BaseException | None = None
        self._failure_order = 0
        self._left: str | None = None
        self._wake, self._stopping, self._answered = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Post the record now: a process that is killed can be named by where it last was."""
        self._wake.set()

    def fail(self, failure: BaseException, stage: Stage) -> None:
        """Tell the others and wait until the report is out, or two heartbeats and a little: then the process may end by its exception."""
        self.stage, self._failure = stage, failure
        self.wake()
        self._answered.wait(2 * self._config.heartbeat_seconds + 2 * REPORT_SECONDS)

    def stop(self, left: str | None) -> None:
        """`left`: the exception by which this rank leaves, where it is one that the others should know of."""
        self._left = left
        self._stopping.set()
        self.wake()
        self._thread.join(self._config.heartbeat_seconds + REPORT_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._stopping.is_set():
            # Where C code holds the interpreter, nothing of this runs: a thread of faulthandler's that needs no interpreter then prints the
            # stacks and ends the process. Later than the others notice the silence, so that they name this rank first.
            faulthandler.dump_traceback_later(self._config.silence_seconds + 2 * self._config.heartbeat_seconds, exit=True, file=stacks.STDERR)
            alarm = self._quietly(self._look)
            if self._store_error is not None:
                alarm = self._look_without_store(self._store_error)
            if alarm is not None:
                self._answer(alarm)
                break
            self._wake.wait(self._config.heartbeat_seconds)
            self._wake.clear()
        faulthandler.cancel_dump_traceback_later()
        self._say_goodbye()

    def _look(self) -> Alarm | None:
        if self._failure is not None and not self._failure_order:
            self._failure_order = self._board.next_failure()
        self._post()
        known = self._board.alarm()
        if known is not None:
            return known
        reason = self._own_trouble() or self._trouble_of_next()
        return self._board.raise_alarm(self._alarm(reason)) if reason else None

    def _own_trouble(self) -> str | None:
        if self._failure is not None:
            return f"failed by {_one_line(self._failure)}"
        stage = self.stage
        if time.monotonic() - stage.begun > stage.limit:
            return f"time-out after {stage.limit:g} s"
        return None

    def _trouble_of_next(self) -> str | None:
        """Whether the next rank that has not ended is dead or silent."""
        if self._watched == self._rank:
            return None
        record = self._board.record(self._watched)
        if record is not None and record.state != "running":
            self._watched = (self._watched + 1) % self._world_size
            self._seen_beat, self._seen_at = -1, time.monotonic()
            return None
        if record is not None and record.beat != self._seen_beat:
            self._last_seen, self._seen_beat, self._seen_at = record, record.beat, time.monotonic()
        if record is not None and self._is_gone(record):
            # Look again: it may have said goodbye between the two looks.
            record = self._board.record(self._watched)
            return f"the process of rank {self._watched} is gone" if record is not None and record.state == "running" else None
        if time.monotonic() - self._seen_at > self._config.silence_seconds:
            return f"rank {self._watched} gave no sign of life for {self._config.silence_seconds:g} s"
        return None

    def _look_without_store(self, error: Exception) -> Alarm | None:
        """The store does not answer: its node is gone, or the job is being taken down. A rank waits a while, for a report by others or its end."""
        lost = time.monotonic() - self._store_lost_at
        reason = self._own_trouble()
        if reason is None and lost > self._config.silence_seconds:
            reason = f"the store in the first node's torchrun did not answer for {lost:.0f} s ({_one_line(error)}): that node or its network is gone"
        return self._alarm(reason) if reason else None

    def _answer(self, alarm: Alarm) -> None:
        """Show this rank's stacks, see to the report, and end the process; after a failure the main thread ends it."""
        # The process may be stuck in a way that stops this as well.
        faulthandler.dump_traceback_later(4 * self._config.heartbeat_seconds + 2 * REPORT_SECONDS + stacks.WRITE_SECONDS + STUCK_SECONDS,
                                          exit=True, file=stacks.STDERR)
        self._heard = True
        self._quietly(self._tell_that_heard)
        self._show(alarm)
        if alarm.rank == self._rank or self._rank == 0:
            self._until(self._board.all_answered, 2 * self._config.heartbeat_seconds)
            report = self._report(alarm)
            log.error("%s\n  Python stacks: above, and in %s", report, stacks.hang_file(self._directory, self._rank).parent)
            if alarm.rank == self._rank:
                self._quietly(lambda: self._board.publish(report))
        else:
            self._until(lambda: self._board.report() is not None, 2 * self._config.heartbeat_seconds + REPORT_SECONDS)
            report = self._quietly(self._board.report)
            if report is not None:
                log.error("%s", report.partition("\n")[0])
        if self._failure is None and not self._stopping.is_set():
            _end_process_group()
            os._exit(EXIT_HANG)
        self._answered.set()

    def _tell_that_heard(self) -> None:
        self._post()
        self._board.count_answer()

    def _show(self, alarm: Alarm) -> None:
        stage, last = self.stage, collectives.last()
        collective = f"{last.name} ({last.caller}), {'in it since' if last.inside else 'ended before'} {last.seconds:.1f} s" if last else "none"
        header = (f"=== {datetime.datetime.now().isoformat(sep=' ', timespec='seconds')} rank {self._rank}, host {self._host}, pid {os.getpid()}: "
                  f"{place(stage.name, stage.step)} since {time.monotonic() - stage.begun:.1f} s; last collective: {collective}\n"
                  f"alarm by rank {alarm.rank}, {place(alarm.stage, alarm.step)}: {alarm.reason}\n")
        failed = "".join(traceback.format_exception(self._failure)) if self._failure is not None else ""
        text = f"{header}{failed or stacks.stack_text()}\n"
        stacks.write_to_stderr(text, self._rank)
        stacks.append_to_file(stacks.hang_file(self._directory, self._rank), text)

    def _report(self, alarm: Alarm) -> str:
        records = self._quietly(self._board.records)
        if records is None:
            return explain_alone(alarm, self._record(), self._last_seen, gone=self._last_seen is not None and self._is_gone(self._last_seen))
        dead = {rank for rank, record in records.items() if not record.heard and self._is_gone(record)}
        return explain(alarm, records, self._world_size, dead)

    def _until(self, true: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._quietly(true) and self._store_error is None and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _quietly(self, call: Callable[[], T]) -> T | None:
        """None where the store does not answer: this rank's own stacks and its end must not depend on it."""
        if self._store_error is None:
            try:
                return call()
            except dist.DistError as error:
                self._store_error, self._store_lost_at = error, time.monotonic()
        return None

    def _say_goodbye(self) -> None:
        def leave() -> None:
            if self._failure is None:
                self._post(state="ended")
            if not self._heard:
                self._board.count_answer()

        self._quietly(leave)

    def _alarm(self, reason: str) -> Alarm:
        return Alarm(rank=self._rank, stage=self.stage.name, step=self.stage.step, reason=reason)

    def _post(self, state: str = "running") -> None:
        self._beat += 1
        self._board.post(self._record(state))

    def _record(self, state: str = "running") -> RankRecord:
        stage = self.stage
        failure = _one_line(self._failure) if self._failure is not None else self._left
        return RankRecord(rank=self._rank, host=self._host, pid=os.getpid(), namespace=self._namespace, stage=stage.name, step=stage.step,
                          stage_seconds=time.monotonic() - stage.begun, stages=stage.number, beat=self._beat,
                          state="failed" if self._failure is not None else state, failure=failure, failure_order=self._failure_order,
                          heard=self._heard, collective=collectives.last())

    def _is_gone(self, record: RankRecord) -> bool:
        """Certain of processes on this host only."""
        if record.namespace != self._namespace:
            return False
        try:
            state = Path(f"/proc/{record.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError as error:  # no file handle left, say: that is no death
            log.warning("process %d of rank %d could not be looked at: %s", record.pid, record.rank, error)
            return False
        return state in "ZX"  # dead, and not yet waited for by its parent


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_MESSAGE]}{'...' if len(text) > MAX_MESSAGE else ''}"


def _namespace() -> str:
    """The boot and the table of processes; two containers of one host may have the same host name and different tables."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _end_process_group() -> None:
    """What this rank started (engine workers, say) must not keep its GPU. Under torchrun a rank leads a process group of its own."""
    if os.getpgrp() == os.getpid() and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):  # the rank itself survives the signal
        os.killpg(os.getpgrp(), signal.SIGTERM)
