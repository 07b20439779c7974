"""A run whose ranks are killed anywhere, again and again, writes what one that nobody disturbed writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from calm import EVALUATED_EVERY, KEPT, STEPS, assert_same_run, make_config
from e2e.killing import ALL, EVERY_RANK, LATE, MAIN_RANK, Kill, kills_file, make_plan, most_steps, write_plan
from started import started
from tiny_world import World, train

from megatron_antisd.metrics.journal import read_journal

pytest.importorskip("vllm", reason="vLLM is not installed")

KILLING = Path(__file__).with_name("killing.py")
SEED = 1


def run_and_kill(directory: Path, plan: list[Kill], config: Path, timeout: float) -> list[dict[str, Any]]:
    """What was killed, after a run that ended well all the same. A kill that did not come is an error of the plan."""
    plan_file = write_plan(directory.with_suffix(".plan.json"), directory, plan)
    arguments = ("--standalone", "--nproc-per-node", "2", "--max-restarts", str(len(plan)), str(KILLING), str(plan_file), str(config))
    with started(directory.with_suffix(".output"), *arguments) as run:
        run.process.wait(timeout)
    kills = [json.loads(line) for line in kills_file(plan_file).read_text().splitlines()]
    assert run.process.returncode == 0, f"{kills}\n{run.output[-6000:]}"
    assert [(kill["life"], kill["place"]) for kill in kills] == [(life, kill.place) for life, kill in enumerate(plan)]
    assert_resumed(directory, kills)
    return kills


def assert_resumed(directory: Path, kills: list[dict[str, Any]]) -> None:
    """The journal: as many restarts as kills, and each from a step no earlier than the newest checkpoint there was before it."""
    resumed = {int(row["message"].split("restart ")[1].split()[0]): row["step"] for row in read_journal(directory) if row["kind"] == "resumed"}
    assert max(resumed) == len(kills)
    for kill in kills:
        if kill["life"] + 1 in resumed:
            assert resumed[kill["life"] + 1] >= kill["saved"], kill


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_killed_three_times(world: World, calm: Path) -> None:
    """In a step, in the middle of a checkpoint's commit, and in an evaluation."""
    plan = [Kill(rank=1, place="step", occurrence=3, delay=0.05), Kill(rank=0, place="commit", occurrence=2), Kill(rank=0, place="evaluate")]
    directory = world.root / "killed"
    kills = run_and_kill(directory, plan, make_config(world, directory), timeout=500)
    assert [kill["saved"] > 0 for kill in kills] == [True, True, True]
    assert_same_run(directory, calm)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_thirty_times_anywhere(world: World) -> None:
    """Every place on every rank; the plan is the same each time."""
    plan, directory, undisturbed = make_plan(SEED), world.root / "killed-30", world.root / "calm-30"
    steps = most_steps(plan, evaluated_every=EVALUATED_EVERY, kept=KEPT) + 1
    assert steps > STEPS
    train(2, make_config(world, undisturbed, run={"steps": steps}), timeout=1000)
    config = make_config(world, directory, run={"steps": steps})
    kills = run_and_kill(directory, plan, config, timeout=3400)
    assert len(kills) == ALL == 30
    assert {kill["place"] for kill in kills if kill["rank"] == 1} == set(EVERY_RANK)
    assert {kill["place"] for kill in kills if kill["rank"] == 0} == {*EVERY_RANK, *MAIN_RANK}
    assert_same_run(directory, undisturbed, step=steps)
    assert not [path.name for path in directory.rglob("*.tmp")], "files that were being written when their rank was killed"


def test_a_plan_is_the_same_each_time_and_different_for_another_seed() -> None:
    assert make_plan(SEED) == make_plan(SEED) != make_plan(SEED + 1)
    assert [kill.place in LATE for kill in make_plan(SEED)] == [False] * (ALL - 3) + [True] * 3
