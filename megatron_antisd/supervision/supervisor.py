"""This rank's stages under time-outs."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist

from megatron_antisd.config.reliability import SupervisionConfig
from megatron_antisd.supervision import preemption
from megatron_antisd.supervision.board import Board
from megatron_antisd.supervision.exit_codes import EXIT_PREEMPTED
from megatron_antisd.supervision.watchdog import Stage, Watchdog

log = logging.getLogger(__name__)

BETWEEN = "between stages"


class Supervisor:
    """Gives signs of life, and ends the run with an explanation when a rank is stuck, silent, dead or failed.

        with Supervisor(config.supervision, directory=config.directory, store=store, rank=rank, world_size=world_size) as supervisor:
            with supervisor.stage("generate", step):
                ...

    Every rank makes one, in the same order where there are several, once the process group has started, and passes through the same
    stages. `store` is the process group's; `directory` gets `hangs/`. SIGTERM and SIGUSR1 must not kill a rank before its report is out
    (torchrun sends SIGTERM to the ranks that are left when one dies), so their handlers are installed, where nobody has, until the end. After
    an exception they are ignored from then on: the process is expected to end by it.
    """

    def __init__(self, config: SupervisionConfig, *, directory: Path, store: dist.Store, rank: int, world_size: int) -> None:
        self._config = config
        self._stages = 0
        self._failed: tuple[BaseException, Stage] | None = None
        self._watchdog = Watchdog(config, directory, Board(store, world_size), rank, world_size, self._new_stage(BETWEEN, None))
        self._installed = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if self._installed:
            preemption.install()
        self._open = True
        self._watchdog.start()

    @contextlib.contextmanager
    def stage(self, name: str, step: int | None = None) -> Iterator[None]:
        """A stage with the time-out `<name>_seconds`, else `other_seconds`. A stage inside another one takes its place; the outer one's
        clock stands still meanwhile."""
        outer, entered = self._watchdog.stage, time.monotonic()
        inner = self._enter(self._new_stage(name, step))
        try:
            yield
        except BaseException as error:
            if self._failed is None or self._failed[0] is not error:  # the innermost stage is where it happened
                self._failed = (error, inner)
            raise
        finally:
            self._stages += 1
            begun = time.monotonic() if outer.name == BETWEEN else outer.begun + time.monotonic() - entered
            self._enter(Stage(name=outer.name, step=outer.step, limit=outer.limit, begun=begun, number=self._stages))

    def close(self) -> None:
        """The end of supervision; nothing is left running. May be called twice."""
        self._close(None, failed=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._open:
            return  # told already, or closed for an end that all ranks agreed on
        failed = isinstance(error, Exception) and not isinstance(error, preemption.Preempted)
        if failed:
            if threading.current_thread() is threading.main_thread():
                preemption.ignore()
            stage = self._failed[1] if self._failed is not None and self._failed[0] is error else self._watchdog.stage
            log.error("failed in stage %s: %s: %s; looking at the other ranks", stage.name, type(error).__name__, error)
            self._watchdog.fail(error, stage)
        left = isinstance(error, SystemExit | KeyboardInterrupt) and getattr(error, "code", 1) not in (None, 0, EXIT_PREEMPTED)
        self._close(f"{type(error).__name__}: {error}" if left else None, failed=failed)

    def _close(self, left: str | None, *, failed: bool) -> None:
        if not self._open:
            return
        self._open = False
        self._watchdog.stop(left)
        if self._installed and not failed:
            preemption.uninstall()

    def _new_stage(self, name: str, step: int | None) -> Stage:
        self._stages += 1
        limit = getattr(self._config, f"{name}_seconds", self._config.other_seconds)
        return Stage(name=name, step=step, limit=limit, begun=time.monotonic(), number=self._stages)

    def _enter(self, stage: Stage) -> Stage:
        self._watchdog.stage = stage
        self._watchdog.wake()
        return stage
