"""Seconds of a step by stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

STAGES = ("generate", "grade", "teacher", "step", "sync")
"""The stages of a step whose seconds every row holds."""

NamedRange = Callable[[str], contextlib.AbstractContextManager[Any]]
"""Marks what runs inside it by a name, in a profiler's trace say."""


class StageTimer:
    """Wall-clock seconds of one step, by stage. Make a new one at the start of each step.

        with StageTimer() as timer:
            with timer("generate"):
                ...
        writer.log(step, {..., **timer.seconds()})

    `synchronize` is called at both ends of a stage: pass `torch.cuda.synchronize` where kernels run asynchronously. `named_range` marks each
    stage in a trace. Stages do not nest, hidden ones aside, so that their seconds never add up to more than the step.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None, named_range: NamedRange | None = None) -> None:
        self._synchronize, self._named_range = synchronize, named_range
        self._start = time.perf_counter()
        self._total: float | None = None
        self._current: str | None = None
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._total = time.perf_counter() - self._start

    @contextlib.contextmanager
    def __call__(self, stage: str, *, hidden: bool = False) -> Iterator[None]:
        """Time a stage; repeated stages add up. `hidden`: overlapped with others, so reported as `seconds_hidden_<stage>`.
        Raises RuntimeError for a stage inside another that is not hidden: its seconds would count twice."""
        if not hidden:
            if self._current is not None:
                raise RuntimeError(f"stage {stage!r} inside stage {self._current!r} would count twice; end the other first, or time it as hidden")
            self._current = stage
        self._wait()
        with self._named_range(stage) if self._named_range is not None else contextlib.nullcontext():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._wait()
                key = f"seconds_hidden_{stage}" if hidden else f"seconds_{stage}"
                self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start
                if not hidden:
                    self._current = None

    def seconds(self) -> dict[str, float | None]:
        """`seconds_<stage>` of every stage in STAGES (None: it did not run) and of all others timed, and `seconds_total` since the timer
        was made, until its `with` ended or, without one, until now."""
        known: dict[str, float | None] = {f"seconds_{stage}": None for stage in STAGES}
        total = self._total if self._total is not None else time.perf_counter() - self._start
        return known | self._seconds | {"seconds_total": total}

    def _wait(self) -> None:
        if self._synchronize is not None:
            self._synchronize()
