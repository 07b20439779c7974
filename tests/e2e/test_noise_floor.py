"""The noise floor's command, and a run that is held to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_world import World, configuration, launch, make_world, rows_of, write

from megatron_antisd.config import load_config
from megatron_antisd.metrics.journal import read_journal
from megatron_antisd.noise_floor import first_rollouts, judge, limit_of
from megatron_antisd.records import Problem, Rollout, RolloutGroup, UpdateFigures


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("floor"))


def parts_of(output: str) -> dict[str, tuple[float, float]]:
    """Of the printed table: name -> (mean, max)."""
    rows = re.findall(r"^\| ([^|]+?) \| ([-\d.e+]+) \| ([-\d.e+]+) \| [\d.]+% \|$", output, re.MULTILINE)
    return {name.split(":")[0]: (float(mean), float(largest)) for name, mean, largest in rows}


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), pytest.param(2, {"tensor_parallel_size": 2, "expert_parallel_size": 2},
                                                                     marks=pytest.mark.slow)])
def test_the_command_prints_the_floor_and_its_parts(world: World, tmp_path: Path, ranks: int, parallel: dict[str, int]) -> None:
    config = write(configuration(world, tmp_path / "run", rollout={"engine": "megatron"}, parallel=parallel), tmp_path / "run.yaml")
    done = launch(ranks, "-m", "megatron_antisd.noise_floor", config)
    assert done.returncode == 0, done.stdout[-4000:]
    parts = parts_of(done.stdout)
    assert list(parts) == ["u with an empty context", "packing", "no part of u"]
    assert all(0 <= mean <= largest < 1e-4 for mean, largest in parts.values())
    assert "8 rollouts, " in done.stdout and "float32" in done.stdout and "below noise_floor.limit=0.0001" in done.stdout
    assert not (tmp_path / "run").exists(), "it measures, it does not train"


@pytest.mark.slow
def test_with_vllm_and_replayed_experts_routing_is_a_part(tmp_path: Path) -> None:
    """bfloat16 MoE: the engine's experts are replayed by default, the teacher routes by itself."""
    pytest.importorskip("vllm")
    world = make_world(tmp_path / "world", head_dim=32)
    config = write(configuration(world, tmp_path / "run", model={"dtype": "bfloat16"}), tmp_path / "run.yaml")
    done = launch(1, "-m", "megatron_antisd.noise_floor", config, "noise_floor.limit=5.0")
    assert done.returncode == 0, done.stdout[-4000:]
    parts = parts_of(done.stdout)
    assert list(parts) == ["u with an empty context", "packing", "routing", "the same experts", "no part of u"]
    assert parts["routing"][0] > 0


def test_a_run_above_the_limit_stops_before_its_first_update(world: World, tmp_path: Path) -> None:
    """Rows of other lengths round differently; rows of the same give the same to the last bit."""
    config = write(configuration(world, tmp_path / "run", rollout={"engine": "megatron"}, noise_floor={"limit": 1e-12, "rollouts": 6},
                                 trainer={"score_micro_batch_tokens": 24}), tmp_path / "run.yaml")
    done = launch(1, "-m", "megatron_antisd.train", config)
    assert done.returncode != 0
    assert "with an empty privileged context, where u must be 0, |u| is" in done.stdout
    assert "expected at most 1e-12 (noise_floor.limit)" in done.stdout
    (row,) = rows_of(tmp_path / "run")
    assert row["noise_floor_mean"] > 1e-12 and row["policy_version"] == 0 and row["updates_skipped"] == 1
    (incident,) = [row for row in read_journal(tmp_path / "run") if row["kind"] == "incident"]
    assert incident["incident"] == "noise_floor" and incident["action"] == "stop" and incident["limit"] == 1e-12


def test_what_is_judged(tmp_path: Path) -> None:
    def config_of(*overrides: str) -> object:
        return load_config(tmp_path / "run.yaml", list(overrides))

    (tmp_path / "run.yaml").write_text("model: {path: m, dtype: float32}\n")
    figures = UpdateFigures(
        loss=0.0, grad_norm=0.0, clip_fraction=0.0, student_entropy_mean=1.0, mismatch_kl=0.0, mismatch_mean=0.0, mismatch_max=0.0)
    measured = UpdateFigures(**{**vars(figures), "noise_floor_mean": 2e-4, "noise_floor_max": 3e-3, "noise_floor_share": 0.0})
    assert judge(config_of(), 1, figures) == [], "not measured"
    (incident,) = judge(config_of(), 1, measured)
    assert incident.action == "stop" and incident.limit == 1e-4 and "the run stops [noise_floor.limit]" in incident.message
    assert judge(config_of("noise_floor.limit=1e-3"), 1, measured) == [] == judge(config_of("model.dtype=bfloat16"), 1, measured)
    (watched,) = judge(config_of("algorithm.method=grpo", "algorithm.shadow=true"), 1, measured)
    assert watched.action == "log", "a run that only watches goes on"
    assert limit_of(config_of("model.dtype=bfloat16")) == 0.1


def test_the_first_rollouts(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: m}\n")
    groups = [RolloutGroup(problem=Problem(id=name, prompt="", answer=""), rollouts=tuple(
        Rollout(problem_id=name, index=i, prompt_ids=(1,), response_ids=(2,), engine_log_probs=(-1.0,), truncated=False, policy_version=0)
        for i in range(4))) for name in "abcd"]

    def sizes(rollouts: int) -> list[int]:
        config = load_config(tmp_path / "run.yaml", [f"noise_floor.rollouts={rollouts}"])
        return [len(group.rollouts) for group in first_rollouts(config, groups)]

    assert sizes(6) == [4, 2] and sizes(8) == [4, 4] and sizes(99) == [4] * 4 and sizes(1) == [1]
