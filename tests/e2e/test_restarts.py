"""Engines and graders that fail in the middle of a real run: it ends as if nothing had happened, and says what did."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World, configuration, launch, make_world, rows_of, write

FAULTS = Path(__file__).with_name("restart_faults.py")
COUNTERS = ("engine_restarts", "grader_rebuilds")
STALL_SECONDS = 15.0
"""Where something hangs. Longer than a step of a tiny model takes on a machine under load."""
Undisturbed = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("restarts"))


def run(world: World, fault: str, *, tensor_parallel: int = 1, name: str = "", fails: bool = False, rollout: dict[str, Any] | None = None,
        **sections: dict[str, Any]) -> tuple[Path, str]:
    """Directory and output of two steps on two ranks: the trainer with tensor and expert parallel 2, the engine as given."""
    directory = world.root / (name or f"{fault}-{tensor_parallel}")
    waits = tensor_parallel > 1 or "hangs" in fault
    rollout = {"tensor_parallel_size": tensor_parallel, **({"stall_seconds": STALL_SECONDS} if waits else {}), **(rollout or {})}
    raw = configuration(
        world, directory, parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2, "timeout_seconds": 60}, rollout=rollout,
        gate={"mode": "always"}, run={"steps": 2}, **sections)
    done = launch(2, FAULTS, fault, write(raw, world.root / f"{directory.name}.yaml"))
    assert (done.returncode != 0) == fails, done.stdout[-6000:]
    return directory, done.stdout


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Undisturbed:
    """The rows of a run without a fault, by tensor-parallel size of the engine; made when they are asked for."""

    @functools.cache
    def rows(tensor_parallel: int) -> list[dict[str, Any]]:
        return rows_of(run(world, "none", tensor_parallel=tensor_parallel)[0])

    return rows


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("seconds_") and key not in ("tokens_per_second", *COUNTERS)}


def counts(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [tuple(row[key] for key in COUNTERS) for row in rows]  # type: ignore[misc]


@pytest.fixture(scope="module")
def disturbed(world: World) -> tuple[Path, str]:
    """A run whose graders die in step 1 and whose engine dies in step 2, both on the last rank alone."""
    return run(world, "grader_dies=1,engine_dies_once=2")


def test_a_run_goes_on_without_its_engine_and_graders_and_counts_it(disturbed: tuple[Path, str]) -> None:
    directory, output = disturbed
    assert counts(rows_of(directory)) == [(0, 1), (1, 0)]
    assert "restarting the engine (1 of at most 3 times): generate failed on ranks [1]: RuntimeError: the engine core died unexpectedly" in output
    assert "rebuilding the grading pool (1 of at most 3 times): 3 grading workers in a row died without an answer" in output
    assert all(row["mismatch_max"] < 1e-4 and row["probe_max"] < 1e-4 and row["grader_crashes"] == 0 for row in rows_of(directory))


@pytest.mark.slow
def test_such_a_run_is_the_undisturbed_one(disturbed: tuple[Path, str], undisturbed: Undisturbed) -> None:
    """All but times and counts is equal to the last bit."""
    assert counts(undisturbed(1)) == [(0, 0), (0, 0)]
    assert [timeless(row) for row in rows_of(disturbed[0])] == [timeless(row) for row in undisturbed(1)]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "tensor_parallel"), [("engine_hangs_once=1", 1), ("engine_dies_once=2", 2), ("engine_hangs_once=2", 2)])
def test_a_run_whose_engine_hangs_or_has_tensor_parallel_partners(world: World, undisturbed: Undisturbed, fault: str, tensor_parallel: int) -> None:
    directory, output = run(world, fault, tensor_parallel=tensor_parallel)
    rows = rows_of(directory)
    assert counts(rows) == [(int(row["step"] == int(fault[-1])), 0) for row in rows]
    assert "restarting the engine (1 of at most 3 times)" in output
    assert "a decoding step did not end within 15 s (rollout.stall_seconds)" in output, "for the partner's sake, where the other one died"
    assert [timeless(row) for row in rows] == [timeless(row) for row in undisturbed(tensor_parallel)]


@pytest.mark.slow
def test_an_in_process_engine_that_dies_on_all_ranks(world: World) -> None:
    rows = [rows_of(run(world, fault, name=f"{fault}-in-process", rollout={"engine": "megatron"})[0])
            for fault in ("none", "megatron_engine_dies_once=2")]
    assert counts(rows[1]) == [(0, 0), (1, 0)]
    assert [timeless(row) for row in rows[1]] == [timeless(row) for row in rows[0]]


@pytest.mark.slow
def test_an_engine_that_always_dies_ends_the_run_on_all_ranks(world: World) -> None:
    directory, output = run(world, "engine_always_dies=2", fails=True, rollout={"max_restarts": 2})
    said = ("EngineError: the engine failed 3 times in this process, and rollout.max_restarts=2; the last failure: generate failed on ranks [1]: "
            "RuntimeError: the engine core died unexpectedly")
    assert output.count(said) >= 2, output[-6000:]
    assert [row["step"] for row in rows_of(directory)] == [1]


@pytest.mark.slow
def test_a_grading_pool_that_may_not_be_rebuilt_ends_the_run_on_all_ranks(world: World) -> None:
    directory, output = run(world, "grader_dies=2", name="grader_ends", fails=True, grading={"max_rebuilds": 0})
    assert output.count("GradingError: grading failed on rank 1: the grading pool died once in this process, and grading.max_rebuilds=0; "
                        "the last death: 3 grading workers in a row died without an answer") >= 2, output[-6000:]
    assert [row["step"] for row in rows_of(directory)] == [1]


@pytest.mark.slow
def test_an_evaluation_survives_both(world: World) -> None:
    settings = {"evaluation": {"every": 1, "max_new_tokens": 12, "benchmarks": [{"name": "held-out", "path": str(world.benchmark), "samples": 2}]}}
    evaluations = []
    for fault in ("none", "evaluation_fails=1"):
        directory, output = run(world, fault, name=f"{fault}-evaluation", **settings)
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        evaluations.append([row for row in rows if "eval/held-out/avg@2" in row])
    assert evaluations[0] == evaluations[1]
    assert "restarting the engine (1 of at most 3 times)" in output and "rebuilding the grading pool (1 of at most 3 times)" in output
    assert counts(rows_of(directory)) == [(0, 0), (1, 0)], "an evaluation's restarts stand in the next step's row"
