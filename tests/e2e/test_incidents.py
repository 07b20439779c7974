"""A gradient that jumps, in a real run: the update is left out, the run goes back to its checkpoint, or it stops, as configured. Its rollouts are
kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from calm import STEPS, make_config
from tiny_world import World, launch, rows_of, without_times

from megatron_antisd.metrics.journal import read_journal
from megatron_antisd.rollout.replay import read_rollouts

pytest.importorskip("vllm", reason="vLLM is not installed")

FAULTS = Path(__file__).with_name("faults.py")
SPIKE = 5


def run_with_spike(world: World, name: str, action: str) -> tuple[Path, str, int]:
    directory = world.root / name
    config = make_config(world, directory, health={"gradient_spike": {"action": action, "factor": 50, "window": 2}}, checkpoint={"every": 2},
                         evaluation={"every": 100, "benchmarks": []})
    done = launch(2, FAULTS, f"gradient_spikes={SPIKE}", config)
    return directory, done.stdout, done.returncode


def assert_told(directory: Path, action: str) -> None:
    (incident,) = [row for row in read_journal(directory) if row["kind"] == "incident"]
    assert (incident["step"], incident["incident"], incident["action"]) == (SPIKE, "gradient_spike", action)
    assert incident["value"] > incident["limit"] > 0 and "health.gradient_spike.factor" in incident["message"]
    groups = read_rollouts(directory / incident["rollouts"])
    assert len(groups) == 4 and all(r.reward is not None and r.policy_version == SPIKE - 1 for group in groups for r in group.rollouts)


def test_rollback(world: World, calm: Path) -> None:
    """Back to the checkpoint of step 4, and on with other problems: the rows up to it are the undisturbed run's, those behind it stand once."""
    directory, output, code = run_with_spike(world, "rollback", "rollback")
    assert code == 0, output[-6000:]
    assert_told(directory, "rollback")
    (back,) = [row for row in read_journal(directory) if row["kind"] == "rollback"]
    assert back["step"] == SPIKE and "rolled back to step_000004" in back["message"] and "steps 5 to 5 are passed over" in back["message"]
    rows = without_times(directory)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))
    undisturbed = [row for row in without_times(calm) if "reward_mean" in row]
    assert rows[:4] == undisturbed[:4]
    assert rows[4]["student_entropy_mean"] != undisturbed[4]["student_entropy_mean"], "the same problems again"


@pytest.mark.slow
def test_skip(world: World) -> None:
    directory, output, code = run_with_spike(world, "skip", "skip")
    assert code == 0, output[-6000:]
    assert_told(directory, "skip")
    rows = rows_of(directory)
    assert [row["updates_skipped"] for row in rows] == [0, 0, 0, 0, 1, 0] and rows[-1]["policy_version"] == STEPS - 1
    assert rows[4]["grad_norm"] > 50 * rows[3]["grad_norm"], "what was seen stands in the row"


@pytest.mark.slow
def test_stop(world: World) -> None:
    directory, output, code = run_with_spike(world, "stop", "stop")
    assert code != 0 and "TrainingStopped" in output and "the run stops [health.gradient_spike.action]" in output
    assert_told(directory, "stop")
    assert [row["step"] for row in rows_of(directory)] == list(range(1, SPIKE + 1))
