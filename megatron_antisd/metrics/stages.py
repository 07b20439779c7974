"""Seconds of a step by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

STAGES = ("generate", "grade", "teacher", "step", "sync")
"""The stages of a step whose seconds every row holds."""


class StageTimer:
    """Wall-clock seconds of one step, by stage. Make a new one at the start of each step.

        timer = StageTimer()
        with timer("generate"):
            ...
        writer.log(step, {..., **timer.seconds()})

    `synchronize` is called at both ends of a stage: pass `torch.cuda.synchronize` where kernels run asynchronously.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str, *, hidden: bool = False) -> Iterator[None]:
        """Time a stage; repeated stages add up. `hidden`: overlapped with others, so reported as `seconds_hidden_<stage>`."""
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            key = f"seconds_hidden_{stage}" if hidden else f"seconds_{stage}"
            self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def seconds(self) -> dict[str, float | None]:
        """`seconds_<stage>` of every stage in STAGES (None: it did not run) and of all others timed, and `seconds_total`
        since the timer was made."""
        known: dict[str, float | None] = {f"seconds_{stage}": None for stage in STAGES}
        return known | self._seconds | {"seconds_total": time.perf_counter() - self._start}

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
