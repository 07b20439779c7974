"""Training with faults injected at planned steps, for `benchmarks/soak.py`: `soak_faults.py PLAN.json CONFIG.yaml [key=value ...]` under torchrun.

The plan is a list of `Fault`s, each done once: a step that runs again after a rollback runs undisturbed. What was done goes to `injected-RANK.jsonl`
beside the plan; at the beginning of every step the rank's own memory goes to `memory-RANK.jsonl`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("engine_raises", "engine_hangs", "worker_killed", "pool_dies", "checkpoint_fails", "nan_gradient", "gradient_spike")
WORKER_KILLED = "worker_killed"
"""Done from outside, by whoever watches the run."""
SPIKE_FACTOR = 200.0
"""`health.gradient_spike.factor` of a run with faults: no gradient of its own is that large."""
_DECODING_STEP, _HANG_SECONDS, _LARGE = 5, 3600.0, 1e6


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault at one step, on one rank alone."""

    kind: str
    step: int
    rank: int


def make_plan(counts: Mapping[str, int], *, steps: int, checkpoint_every: int, ranks: int, seed: int) -> list[Fault]:
    """`counts[kind]` faults of each kind, spread over the steps, no two at one step; a failing checkpoint at a step that has one. The steps that a
    rollback undoes, and the checkpoint that it goes back to, have no other fault: the rows of what happened there would be gone."""
    rng = random.Random(seed)
    saved = {step for step in range(1, steps) if step % checkpoint_every == 0}
    free = set(range(4, steps - 1))
    plan: list[Fault] = []
    for kind in sorted(counts, key=lambda kind: kind != "gradient_spike"):  # it needs the most room
        for number in range(counts[kind]):
            low, high = 2 * checkpoint_every, steps - 1
            window = range(low + (high - low) * number // counts[kind], low + (high - low) * (number + 1) // counts[kind])
            candidates = [step for step in window if step in free and (step in saved) == (kind == "checkpoint_fails")]
            if kind == "gradient_spike":
                candidates = [step for step in candidates if set(range(step - step % checkpoint_every, step)) <= free]
            if not candidates:
                raise ValueError(f"no step is left for {kind} number {number + 1} of {counts[kind]} in {steps} steps: more steps or fewer faults")
            step = rng.choice(candidates)
            first = step - step % checkpoint_every if kind == "gradient_spike" else step
            free -= set(range(first, step + 1))
            plan.append(Fault(kind=kind, step=step, rank=rng.randrange(ranks)))
    return sorted(plan, key=lambda fault: fault.step)


class Faults:
    """Does what the plan says for this rank; `install` puts it into the program's parts before the run is built."""

    def __init__(self, plan_file: Path, rank: int) -> None:
        self._plan = [fault for fault in map(_read_fault, json.loads(plan_file.read_text())) if fault.rank == rank]
        self._done = plan_file.with_name(f"injected-{rank}.jsonl")
        self._memory = plan_file.with_name(f"memory-{rank}.jsonl")
        self._doomed: Any = None
        self._full_disk = False
        self._gradient: float | None = None
        self._trainer: Any = None

    def take(self, kind: str, step: int) -> bool:
        """Whether this fault is due here and now; it is taken from the plan and written down then."""
        due = [fault for fault in self._plan if (fault.kind, fault.step) == (kind, step)]
        for fault in due:
            self._plan.remove(fault)
            _append(self._done, {**dataclasses.asdict(fault), "time": time.time()})
        return bool(due)

    def install(self) -> None:
        from megatron_antisd import stages

        generate, update = stages.generate, stages.update

        def generate_with_faults(run: Any, step: int) -> Any:
            if self._trainer is None:
                self._trainer = run.trainer
                self._install_late()
            _append(self._memory, {"step": step, "time": time.time(), **own_memory()})
            for kind, act in (("engine_raises", _raise), ("engine_hangs", _hang)):
                if self.take(kind, step):
                    _in_the_middle(run.engine, act)
            if self.take("pool_dies", step):
                self._doomed = run.grader
                _kill_workers(run.grader)
            return generate(run, step)

        def update_with_faults(run: Any, groups: Any, teacher: Any, student: Any, lambda_: float, step: int) -> Any:
            if self.take("nan_gradient", step):
                self._gradient = float("nan")
            if self.take("gradient_spike", step):
                self._gradient = _LARGE
            return update(run, groups, teacher, student, lambda_, step)

        stages.generate, stages.update = generate_with_faults, update_with_faults

    def _install_late(self) -> None:
        """Into what must not be imported before the run is built."""
        from megatron_antisd.checkpoint import CheckpointWriter, tensor_files
        from megatron_antisd.grading import GradingPool
        from megatron_antisd.parallel import trainer

        update, replace, rebuild = trainer.guarded_update, GradingPool._replace, GradingPool.rebuild
        save, stream = CheckpointWriter.save, tensor_files._WatchedStream.__init__

        def broken_update(optimizer: Any, *arguments: Any, **options: Any) -> Any:
            value, self._gradient = self._gradient, None
            if value is not None:
                self._trainer.ddp[0].buffers[0].grad_data.fill_(value)
            return update(optimizer, *arguments, **options)

        def replace_and_kill(pool: GradingPool, slot: int, lost: str | None) -> int:
            code = replace(pool, slot, lost)
            if pool is self._doomed:
                _kill_workers(pool)
            return code

        def rebuild_in_peace(pool: GradingPool, death: Any) -> None:
            self._doomed = None
            rebuild(pool, death)

        def save_with_faults(writer: CheckpointWriter, step: int, *arguments: Any, **options: Any) -> None:
            self._full_disk = self.take("checkpoint_fails", step)
            save(writer, step, *arguments, **options)

        def open_stream(watched: Any, file: Any, name: str) -> None:
            full, self._full_disk = self._full_disk, False
            stream(watched, _FullDisk(file) if full else file, name)

        trainer.guarded_update, CheckpointWriter.save = broken_update, save_with_faults  # type: ignore[method-assign]
        tensor_files._WatchedStream.__init__ = open_stream  # type: ignore[method-assign]
        GradingPool._replace, GradingPool.rebuild = replace_and_kill, rebuild_in_peace  # type: ignore[method-assign]


class _FullDisk:
    """A file that takes a part of what is written and then no more."""

    def __init__(self, file: Any) -> None:
        self._file, self._taken = file, 0

    def write(self, data: Any) -> int:
        if self._taken > 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._taken += memoryview(data).nbytes
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _raise() -> None:
    raise RuntimeError("the engine core died unexpectedly")


def _hang() -> None:
    time.sleep(_HANG_SECONDS)


def _in_the_middle(engine: Any, act: Callable[[], None]) -> None:
    """In the fifth decoding step of the next generation."""
    core = engine._engine._replica._llm.llm_engine
    original, calls = core.step, []

    def failing_step() -> Any:
        calls.append(1)
        if len(calls) == _DECODING_STEP:
            act()
        return original()

    core.step = failing_step


def _kill_workers(pool: Any) -> None:
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()


# -- a process's own memory ------------------------------------------------------------------------------------------------


class _MallInfo(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def own_memory() -> dict[str, int]:
    """Of this process: bytes by the kernel (as `read_sizes`) and by malloc (`malloc_used` handed out, `malloc_free` kept for later), threads, open
    files."""
    found = {**read_sizes(os.getpid()), "threads": len(os.listdir("/proc/self/task")), "files": len(os.listdir("/proc/self/fd"))}
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is not None:
        mallinfo.restype = _MallInfo
        info = mallinfo()
        found |= {"malloc_used": info.uordblks + info.hblkhd, "malloc_free": info.fordblks}
    return found


def read_sizes(pid: int) -> dict[str, int]:
    """`rss`, `uss` and `pss` (shared pages divided among those who share them) in bytes. Raises OSError where the process is gone."""
    sums: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            key, _, value = line.partition(":")
            if value.endswith("kB\n"):
                sums[key] = int(value.split()[0]) * 1024
    return {"rss": sums.get("Rss", 0), "uss": sums.get("Private_Clean", 0) + sums.get("Private_Dirty", 0), "pss": sums.get("Pss", 0)}


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _read_fault(row: dict[str, Any]) -> Fault:
    return Fault(**row)


def main() -> None:
    plan, *arguments = sys.argv[1:]
    from megatron_antisd.train import main as train

    Faults(Path(plan), int(os.environ["RANK"])).install()
    train(arguments)


if __name__ == "__main__":
    main()
