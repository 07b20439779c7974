"""Whole runs of a mixture of experts in bfloat16: the engine's experts in the update, and what the row says of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_world import World, configuration, make_world, rows_of, train, write

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")]
LAYOUT = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1, "timeout_seconds": 60}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), num_experts=8, dtype=torch.bfloat16)


@pytest.mark.parametrize("teacher", ["free", "own"])
def test_the_engines_experts_take_the_routers_part_out_of_the_mismatch(world: World, tmp_path: Path, teacher: str) -> None:
    """`auto` replays here; all rollouts of the batch are the sample, so its replayed figures are the update's."""
    raw = configuration(world, tmp_path / "run", model={"dtype": "bfloat16"}, parallel=LAYOUT,
                        routing={"sample_every": 2, "sample_rollouts": 100, "teacher": teacher})
    train(2, write(raw, tmp_path / "config.yaml"))
    rows = rows_of(tmp_path / "run")
    shares = [json.loads(line) for line in (tmp_path / "run/routing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in shares] == [1, 2, 3] and all(len(row["equal_share"]) == 4 for row in shares)
    for row, share in zip(rows, shares, strict=True):
        assert 0.5 < row["routes_equal_share_min"] <= row["routes_equal_share"] < 1
        assert row["routes_equal_share"] == pytest.approx(sum(share["equal_share"]) / 4, abs=1e-5)
    assert rows[1]["mismatch_free_max"] is None
    for row in (rows[0], rows[2]):
        assert row["mismatch_replayed_max"] == pytest.approx(row["mismatch_max"], abs=1e-6)
        assert row["mismatch_replayed_max"] < 0.5 * row["mismatch_free_max"]
        assert row["mismatch_replayed_outside"] == 0


def test_the_scoring_passs_experts_are_the_updates(world: World, tmp_path: Path) -> None:
    raw = configuration(world, tmp_path / "run", model={"dtype": "bfloat16"}, parallel=LAYOUT, algorithm={"updates_per_batch": 2},
                        routing={"replay": "scoring", "teacher": "student"})
    train(2, write(raw, tmp_path / "config.yaml"))
    assert [row["routes_equal_share"] for row in rows_of(tmp_path / "run")] == [1.0, 1.0, 1.0]


def test_rollouts_without_routes_end_the_run_and_say_what_to_do(world: World, tmp_path: Path) -> None:
    saved = {"save_rollouts": str(tmp_path / "rollouts")}
    raw = configuration(world, tmp_path / "plain", run={"steps": 1}, model={"dtype": "bfloat16"}, parallel=LAYOUT, routing={"replay": "off"},
                        debug=saved)
    train(2, write(raw, tmp_path / "plain.yaml"))
    raw = configuration(world, tmp_path / "replayed", run={"steps": 1}, model={"dtype": "bfloat16"}, parallel=LAYOUT,
                        debug={"load_rollouts": str(tmp_path / "rollouts")})
    with pytest.raises(AssertionError, match="16 rollouts have no routes.*Set routing.replay=off"):
        train(2, write(raw, tmp_path / "replayed.yaml"))
