"""Saved rollouts come back equal."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_antisd.records import Problem, Rollout, RolloutGroup
from megatron_antisd.rollout.replay import load_rollouts, save_rollouts


@pytest.fixture
def groups() -> list[RolloutGroup]:
    # Log-probs without a short decimal form, text that JSON must escape, and fields that are absent.
    rollout = Rollout(
        problem_id="p", index=0, prompt_ids=(1, 2), response_ids=(3, 151_643), engine_log_probs=(-math.pi / 3, -1e-17), truncated=True,
        policy_version=7, text="a\nb \u2028 \"\\boxed{½}\" \U0001f600", reward=0.1 + 0.2, feedback="Your answer is incorrect.")
    ungraded = Rollout(problem_id="p", index=1, prompt_ids=(1, 2), response_ids=(4,), engine_log_probs=(0.0,), truncated=False, policy_version=7)
    first = RolloutGroup(problem=Problem(id="p", prompt="Was ist\u20281+1?", answer="2", solution="s", source="x"), rollouts=(rollout, ungraded))
    second = RolloutGroup(problem=Problem(id="q", prompt="2", answer="2"), rollouts=(replace(rollout, problem_id="q"),))
    return [first, second]


def test_round_trip(tmp_path: Path, groups: list[RolloutGroup]) -> None:
    save_rollouts(tmp_path / "new" / "folder", 3, groups)
    assert load_rollouts(tmp_path / "new" / "folder", 3) == groups
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["step_000003.jsonl"]


def test_a_line_is_a_group(tmp_path: Path, groups: list[RolloutGroup]) -> None:
    save_rollouts(tmp_path, 1, groups)
    rows = [json.loads(line) for line in (tmp_path / "step_000001.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [row["problem"]["id"] for row in rows] == ["p", "q"]


def test_saving_again_replaces(tmp_path: Path, groups: list[RolloutGroup]) -> None:
    save_rollouts(tmp_path, 1, groups)
    save_rollouts(str(tmp_path), 1, groups[:1])
    assert load_rollouts(str(tmp_path), 1) == groups[:1]


def test_a_missing_step_is_named(tmp_path: Path, groups: list[RolloutGroup]) -> None:
    save_rollouts(tmp_path, 1, groups)
    with pytest.raises(FileNotFoundError, match="debug.load_rollouts: no rollouts of step 2"):
        load_rollouts(tmp_path, 2)
