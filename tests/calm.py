"""A run that tests disturb in one way or another, and whether it is in the end the one that nobody disturbed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from started import Started
from tiny_world import World, configuration, without_times, write

STEPS, EVALUATED_EVERY, KEPT = 6, 3, 2
PATIENCE = 240
"""Seconds for whatever a run is waited for."""


def make_config(world: World, directory: Path, **sections: dict[str, Any]) -> Path:
    """STEPS steps on two ranks, of which tensor and expert parallelism make one shard each. All these runs have one name, which stands in
    their evaluations, and a directory each. An evaluation is made in four parts. `sections` are laid over it key by key."""
    raw = configuration(
        world, directory, run={"name": "calm", "steps": STEPS}, parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2},
        checkpoint={"every": 1, "keep": KEPT}, supervision={"heartbeat_seconds": 0.5},
        evaluation={"every": EVALUATED_EVERY, "max_new_tokens": 12, "samples_at_once": 4,
                    "benchmarks": [{"name": "tiny", "path": str(world.benchmark), "samples": 2}]})
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return write(raw, directory.with_suffix(".yaml"))


def files_below(directory: Path) -> dict[str, bytes]:
    """Without the index of a checkpoint's tensors, which holds a random number of the save."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".metadata"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_same_run(directory: Path, undisturbed: Path, *, step: int = STEPS, beyond: Collection[str] = ()) -> None:
    """Metrics, samples, u by kind of token, scored rollouts, every sample of every evaluation, the exported weights, and the tensors of the
    last checkpoint, `step`: all but the metrics' times byte by byte; nothing is missing and nothing there twice. `beyond`: keys that only the rows of
    `directory` have."""
    rows = [{key: value for key, value in row.items() if key not in beyond} for row in without_times(directory)]
    assert rows == without_times(undisturbed)
    for name in ("samples.jsonl", "token_u.jsonl"):
        assert (directory / name).read_bytes() == (undisturbed / name).read_bytes(), name
    for name in ("rollouts", "evaluations", "hf", f"checkpoints/step_{step:06d}/tensors"):
        mine, theirs = files_below(directory / name), files_below(undisturbed / name)
        assert theirs, f"{undisturbed / name} is empty"
        assert mine.keys() == theirs.keys(), name
        assert [file for file in mine if mine[file] != theirs[file]] == [], name


def wait_until(run: Started, what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert run.process.poll() is None, f"the run is over:\n{run.output[-4000:]}"
        assert time.monotonic() < end, f"nothing after {PATIENCE} s:\n{run.output[-4000:]}"
        time.sleep(0.01)
