"""The same seed and layout give the same run, bit for bit: every figure but the times, every sampled token, every weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import World, configuration, make_world, train, write

OF_THE_CLOCK = ("seconds", "tokens_per_second")
"""How the keys of metrics.jsonl that hold times begin."""
LAYOUTS = {
    "tp2-ep2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "dp2": {},
    "pp2": {"pipeline_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("determinism"))


def run(world: World, name: str, layout: str, engine: str, steps: int, seed: int = 0) -> Path:
    """Train on two ranks; the run's directory. The gate opens after the first step, so that the whole method takes part."""
    directory = world.root / name
    raw = configuration(
        world, directory, run={"steps": steps, "seed": seed}, parallel=LAYOUTS[layout], rollout={"engine": engine}, gate={"mode": "always"},
        debug={"save_rollouts": str(directory / "rollouts")})
    train(2, write(raw, world.root / f"{name}.yaml"))
    return directory


def figures(directory: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_CLOCK)} for row in rows]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_equal_bitwise(directories: Sequence[Path], steps: int) -> None:
    first, second = directories
    assert figures(first) == figures(second)
    rows = [row for row in figures(first) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and rows[-1]["lambda"] > 0 and rows[-1]["grad_norm"] > 0
    for step in range(1, steps + 1):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (first / name).read_bytes() == (second / name).read_bytes()
    weights = [weights_in(directory / "hf") for directory in directories]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_the_same_run_twice_is_bitwise_the_same(world: World) -> None:
    directories = [run(world, name, "tp2-ep2", "vllm", steps=2) for name in ("first", "second")]
    assert_equal_bitwise(directories, steps=2)
    start = weights_in(world.checkpoint)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights_in(directories[0] / "hf").items()), "nothing was trained"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "engine"), [(layout, engine) for layout in LAYOUTS for engine in ("vllm", "megatron")
                                                if (layout, engine) != ("tp2-ep2", "vllm")])
def test_every_layout_and_engine_repeats_itself(world: World, layout: str, engine: str) -> None:
    assert_equal_bitwise([run(world, f"{layout}-{engine}-{number}", layout, engine, steps=2) for number in (1, 2)], steps=2)


@pytest.mark.slow
def test_another_seed_is_another_run(world: World) -> None:
    """Or the tests above would pass for a run that does not look at its seed."""
    first, other = (run(world, f"seed-{seed}", "dp2", "vllm", steps=1, seed=seed) for seed in (0, 1))
    assert (first / "rollouts/step_000001.jsonl").read_bytes() != (other / "rollouts/step_000001.jsonl").read_bytes()
