"""Profiler traces of named steps: one Chrome trace a rank, and beside it a table of where that rank's time went."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_antisd.config import ProfileConfig
from megatron_antisd.metrics.files import PROFILE
from megatron_antisd.metrics.stages import NamedRange

CPU_CATEGORIES = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
"""What nests on a thread; the profiler's other categories lie over these."""
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")

SUMMARY_ROWS = 25
SUMMARY_LIMIT_BYTES = 256 << 20
"""A larger trace is not summarised: reading it would take many times its size in memory."""

_log = logging.getLogger(__name__)


class StepProfiler:
    """Traces the steps of `config.steps` on this rank; does nothing in all others.

        profile = StepProfiler(config.profile, config.directory, rank=rank, barrier=dist.barrier)
        with profile(step) as named_range, StageTimer(synchronize, named_range) as timer:
            ...

    `barrier` holds ranks together before and after a traced step: the profiler's own start and writing would else count as some stage's
    waiting for the slowest rank.
    """

    def __init__(self, config: ProfileConfig, run_directory: Path, *, rank: int, barrier: Callable[[], Any]) -> None:
        self._config, self._rank, self._barrier = config, rank, barrier
        self._directory = Path(config.directory) if config.directory is not None else run_directory / PROFILE

    @contextlib.contextmanager
    def __call__(self, step: int) -> Iterator[NamedRange | None]:
        """Around one step. Gives what names a range of the trace; None where there is none. Collective in a traced step."""
        if step not in self._config.steps:
            yield None
            return
        import torch  # here, not above: reports read metrics without torch
        from torch.profiler import ProfilerActivity, profile, record_function

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities, record_shapes=self._config.shapes, with_stack=self._config.stack,
                     profile_memory=self._config.memory) as trace:
            self._barrier()
            with record_function(f"ProfilerStep#{step}"):  # the name by which trace readers tell steps apart
                yield record_function
        self._write(trace, step)
        self._barrier()

    def _write(self, trace: Any, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"step_{step:06}_rank_{self._rank:04}.json.gz"
        raw = path.with_name(path.name.removesuffix(".gz") + ".tmp")
        trace.export_chrome_trace(str(raw))
        # Not by the profiler itself: it compresses line by line at the highest level, which takes three times as long as all the rest.
        with raw.open("rb") as source, gzip.open(path, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        path.with_name(path.name.replace(".json.gz", ".txt")).write_text(_summary_of(raw, path.name))
        raw.unlink()
        _log.info("step %d: profiler traces of all ranks are in %s; open one at https://ui.perfetto.dev (rank %d's: %s, %.1f MB)",
                  step, self._directory, self._rank, path.name, path.stat().st_size / 1e6)


def _summary_of(raw: Path, name: str) -> str:
    size = raw.stat().st_size
    if size > SUMMARY_LIMIT_BYTES:
        return f"{name}: {size / 1e9:.1f} GB uncompressed, too large to be summarised here (limit {SUMMARY_LIMIT_BYTES / 1e9:.1f} GB)\n"
    return f"{name}: seconds by self time\n\n{summary(json.loads(raw.read_bytes())['traceEvents'])}"


def summary(events: Iterable[Mapping[str, Any]]) -> str:
    """Tables of the longest operators on the CPU (self time: without what they call) and on the GPU, from a trace's `traceEvents`."""
    complete = [event for event in events if event.get("ph") == "X"]
    threads: dict[tuple[Any, Any], list[tuple[float, float, str]]] = defaultdict(list)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in complete:
        if event.get("cat") in CPU_CATEGORIES:
            threads[event["pid"], event["tid"]].append((event["ts"], event["dur"], event["name"]))
        elif event.get("cat") in GPU_CATEGORIES:
            kernels[event["name"]].append(event["dur"])
    operators: dict[str, list[float]] = defaultdict(list)
    for thread in threads.values():
        for name, microseconds in self_times(thread):
            operators[name].append(microseconds)
    return "\n".join(_table(where, times) for where, times in (("CPU", operators), ("GPU", kernels)) if times)


def self_times(ranges: Iterable[tuple[float, float, str]]) -> Iterator[tuple[str, float]]:
    """(name, duration without the ranges inside it) of one thread's nested ranges (start, duration, name), in any order and one unit."""
    open_: list[tuple[float, str, list[float]]] = []  # (end, name, [time not given to a range inside])
    for start, duration, name in sorted(ranges, key=lambda r: (r[0], -r[1])):
        while open_ and open_[-1][0] <= start:
            _, closed, left = open_.pop()
            yield closed, left[0]
        if open_:
            open_[-1][2][0] -= duration
        open_.append((start + duration, name, [duration]))
    for _, closed, left in open_:
        yield closed, left[0]


def _table(where: str, times: Mapping[str, list[float]]) -> str:
    """`times` in microseconds, by name."""
    total = sum(map(sum, times.values())) or 1.0
    longest = sorted(((sum(values), name) for name, values in times.items()), reverse=True)[:SUMMARY_ROWS]
    lines = [f"{where:<60} {'calls':>9} {'seconds':>10} {'share':>7}"]
    lines += [f"{name[:60]:<60} {len(times[name]):>9} {seconds / 1e6:>10.4f} {seconds / total:>7.1%}" for seconds, name in longest]
    return "\n".join(lines) + "\n"
