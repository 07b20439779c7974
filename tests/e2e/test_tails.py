"""Long tails, corrections and the noise floor through the whole loop on one rank with the in-process engine: two steps each, all in one process; one
step of all together is fast."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World, configuration, launch, make_world, rows_of, write

from megatron_antisd.records import RolloutGroup
from megatron_antisd.rollout.replay import load_rollouts

SCRIPT = Path(__file__).with_name("variants.py")
GRPO = {"algorithm": {"method": "grpo"}}

TAILS = {"oversample": 1.25, "dynamic_sampling": True, "dynamic_rounds": 2, "schedule": "longest_first"}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": GRPO,
    "oversample": {**GRPO, "tails": {"oversample": 1.5}},
    "dynamic": {**GRPO, "tails": {"dynamic_sampling": True, "dynamic_rounds": 2, "oversample": 1.25}},
    "longest": {**GRPO, "tails": {"schedule": "longest_first"}},
    "mask": {**GRPO, "tails": {"overlong": "mask"}},
    "penalty": {**GRPO, "tails": {"overlong": "penalty", "overlong_buffer": 8, "overlong_penalty": 0.5}},
    "truncate": {**GRPO, "correction": {"mode": "truncate", "upper": 1.0000001}},
    "sequence": {"correction": {"mode": "mask", "level": "sequence"}},
    "antisd": {"gate": {"mode": "always", "warmup_steps": 1}},
    "whole": {**GRPO, "tails": TAILS, "run": {"steps": 6}, "checkpoint": {"every": 3}},
    "stopped": {**GRPO, "tails": TAILS, "run": {"steps": 3}, "checkpoint": {"every": 3}},
    "resumed": {**GRPO, "tails": TAILS, "run": {"steps": 6, "name": "stopped"}, "checkpoint": {"every": 3}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tails"))


@pytest.fixture(scope="module")
def rows(world: World) -> dict[str, list[dict[str, Any]]]:
    configs = []
    for name, sections in RUNS.items():
        directory = world.root / sections.get("run", {}).get("name", name)
        raw = configuration(world, directory, **{
            "rollout": {"engine": "megatron"}, "debug": {"save_rollouts": str(directory / "saved")}, **sections})
        raw["run"]["steps"] = sections.get("run", {}).get("steps", 2)
        configs.append(write(raw, world.root / f"{name}.yaml"))
    done = launch(1, SCRIPT, *configs, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:]
    return {name: rows_of(world.root / name) for name in RUNS if name != "resumed"}


def test_a_step_with_all_of_it(world: World) -> None:
    directory = world.root / "all"
    raw = configuration(world, directory, rollout={"engine": "megatron"}, tails={**TAILS, "overlong": "mask"}, correction={"mode": "truncate"},
                        algorithm={"updates_per_batch": 2, "zero_variance": "drop"}, run={"name": "all", "directory": str(directory), "steps": 1})
    done = launch(1, SCRIPT, write(raw, world.root / "all.yaml"), timeout=200)
    assert done.returncode == 0, done.stdout[-6000:]
    (row,) = rows_of(directory)
    assert row["groups_given_up"] >= 1 and row["generation_rounds"] in (1, 2) and row["groups_dropped"] >= 0 and row["overlong_rollouts"] >= 0
    assert row["policy_version"] >= 1 and row["correction_weight_mean"] == pytest.approx(1.0, abs=1e-3)
    assert 0 <= row["noise_floor_mean"] <= row["noise_floor_max"] < 1e-4


def groups_of(world: World, name: str, step: int) -> list[RolloutGroup]:
    return load_rollouts(world.root / name / "saved", step)


@pytest.mark.slow
def test_what_is_off_is_null(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in rows["plain"]:
        for key in ("groups_given_up", "generation_rounds", "groups_dropped", "overlong_rollouts", "correction_weight_mean",
                    "correction_touched_share", "noise_floor_mean"):
            assert row[key] is None, key


@pytest.mark.slow
def test_oversampling_gives_up_the_slowest_groups(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    """Six groups are begun for four; those kept are drawn as if nothing else had been."""
    assert [row["groups_given_up"] for row in rows["oversample"]] == [2, 2]
    kept, plain = groups_of(world, "oversample", 1), groups_of(world, "plain", 1)
    assert len(kept) == 4
    drawn = {group.problem.id: group for group in plain}
    same = [group for group in kept if group.problem.id in drawn]
    assert same and all([r.response_ids for r in g.rollouts] == [r.response_ids for r in drawn[g.problem.id].rollouts] for g in same)
    both = [group.problem.id for step in (1, 2) for group in groups_of(world, "oversample", step)]
    assert len(set(both)) == 8, "what was given up comes again in its next epoch, not at the next step"


@pytest.mark.slow
def test_dynamic_sampling_draws_until_rewards_differ(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    for step, row in enumerate(rows["dynamic"], start=1):
        groups = groups_of(world, "dynamic", step)
        flat = [len(set(g.rewards().tolist())) == 1 for g in groups]
        assert len(groups) == 4 and flat == sorted(flat), "equal groups only fill up, behind the others"
        assert row["zero_variance_groups"] == sum(flat)
        assert row["generation_rounds"] == 2 or not any(flat)
        assert row["groups_given_up"] >= 1 and row["groups_dropped"] >= 0


@pytest.mark.slow
def test_lengths_are_learned_and_change_no_draw(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    for step in (1, 2):
        assert groups_of(world, "longest", step) == groups_of(world, "plain", step)
    state = json.loads((world.root / "whole/checkpoints/step_000006/state.json").read_text())
    assert {g.problem.id for step in range(1, 7) for g in groups_of(world, "whole", step)} <= state["lengths"].keys()
    assert all(1 <= tokens <= 16 for tokens in state["lengths"].values())


@pytest.mark.slow
def test_a_resumed_run_draws_gives_up_and_drops_the_same(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    """24 problems, at least 5 a step: the second epoch begins behind the stop, and some lengths are known by then."""
    for step in range(1, 7):
        mine, theirs = ([(r.problem_id, r.response_ids) for g in groups_of(world, name, step) for r in g.rollouts] for name in ("stopped", "whole"))
        assert mine == theirs, step
    drawn = [(row["generation_rounds"], row["groups_given_up"]) for row in rows["whole"]]
    assert any(rounds == 2 for rounds, _ in drawn) and all(given_up >= 1 for _, given_up in drawn)


@pytest.mark.slow
def test_masked_responses_leave_the_loss_alone(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    """By hand: on-policy the loss is minus the weighted mean of A_seq, over the tokens of responses that ended."""
    groups = groups_of(world, "mask", 1)
    total, tokens = 0.0, 0
    for group in groups:
        for rollout, advantage in zip(group.rollouts, advantages(group.rewards().tolist()), strict=True):
            if not rollout.truncated:
                total, tokens = total - advantage * len(rollout.response_ids), tokens + len(rollout.response_ids)
    row = rows["mask"][0]
    assert row["loss"] == pytest.approx(total / tokens, abs=2e-6)
    assert row["overlong_rollouts"] == sum(r.truncated for g in groups for r in g.rollouts) > 0
    assert row["reward_mean"] == pytest.approx(sum(float(g.rewards().sum()) for g in groups) / 16)


@pytest.mark.slow
def test_the_penalty_enters_the_advantage_and_no_figure(rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    groups = groups_of(world, "penalty", 1)
    total, tokens, touched = 0.0, 0, 0
    for group in groups:
        lengths = [len(r.response_ids) for r in group.rollouts]
        shaped = [reward - 0.5 * max(0.0, (n - 8) / 8) for reward, n in zip(group.rewards().tolist(), lengths, strict=True)]
        touched += sum(n > 8 for n in lengths)
        total -= sum(a * n for a, n in zip(advantages(shaped), lengths, strict=True))
        tokens += sum(lengths)
    row = rows["penalty"][0]
    assert row["loss"] == pytest.approx(total / tokens, abs=2e-6)
    assert row["overlong_rollouts"] == touched > 0
    assert row["reward_mean"] == pytest.approx(sum(float(g.rewards().sum()) for g in groups) / 16), "the grader's"


@pytest.mark.slow
def test_weights_near_one_are_seen_and_change_next_to_nothing(rows: dict[str, list[dict[str, Any]]]) -> None:
    for ours, plain in zip(rows["truncate"], rows["plain"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["correction_weight_mean"] == pytest.approx(1.0, abs=1e-5) and ours["correction_weight_max"] <= 1.000001
        assert ours["correction_touched_share"] > 0, "half of all rounding lies above a bound of 1"
    for row in rows["sequence"]:
        assert row["correction_touched_share"] == 0.0 and row["correction_weight_min"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_the_floor_is_logged_at_the_first_update_alone(rows: dict[str, list[dict[str, Any]]]) -> None:
    first, second = rows["antisd"]
    assert 0 <= first["noise_floor_mean"] <= first["noise_floor_max"] < 1e-4 and first["noise_floor_share"] == 0.0
    assert second["noise_floor_mean"] is None


def advantages(rewards: list[float]) -> list[float]:
    """A_seq by hand."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (deviation + 1e-6) for r in rewards]


@pytest.mark.slow
def test_rewards_of_this_world_differ(world: World, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Or the tests above would compare zeros."""
    found = Counter(len(set(group.rewards().tolist())) for name in ("mask", "penalty", "plain") for group in groups_of(world, name, 1))
    assert found[2] > 0 and rows["mask"][0]["loss"] != 0
