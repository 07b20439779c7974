"""A run killed between steps and resumed writes the numbers of one that was never killed; continual starts from another run's policy."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import _environment, _kill_tree
from tiny_world import World, configuration, make_world, rows_of, train, without_times, write

pytest.importorskip("vllm", reason="vLLM is not installed")

STEPS, EVERY, KILLED_AFTER = 6, 2, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("resume"))


def make_config(world: World, name: str, **sections: dict[str, Any]) -> Path:
    raw = configuration(
        world, world.root / name, run={"steps": STEPS}, parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2},
        checkpoint={"every": EVERY, "save_hf": False}, evaluation={"every": 3, "benchmarks": [{"name": "tiny", "path": str(world.benchmark)}]})
    for section, values in sections.items():
        raw[section] = {**raw.get(section, {}), **values}
    return write(raw, world.root / f"{name}.yaml")


def run_until(config: Path, directory: Path, step: int) -> None:
    """Start the run on two ranks and SIGKILL every process of it once `step` stands in metrics.jsonl."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_antisd.train", str(config)]
    process = subprocess.Popen(command, env=_environment(None), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    try:
        while process.poll() is None and time.monotonic() < deadline:
            metrics = directory / "metrics.jsonl"
            if metrics.is_file() and any(json.loads(line)["step"] >= step for line in metrics.read_text().splitlines() if line.endswith("}")):
                break
            time.sleep(0.02)
        else:
            raise AssertionError(f"step {step} did not come; exit code {process.poll()}")
    finally:
        _kill_tree(process)
        process.wait()
    assert process.returncode in (-signal.SIGKILL, 1, 137), process.returncode


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    train(2, make_config(world, "undisturbed"))
    return world.root / "undisturbed"


def test_killed_and_resumed_equals_undisturbed(world: World, undisturbed: Path) -> None:
    config, directory = make_config(world, "killed"), world.root / "killed"
    run_until(config, directory, KILLED_AFTER)
    assert max(row["step"] for row in rows_of(directory)) < STEPS, "the run was over before it could be killed"
    output = train(2, config)
    assert "resumed from" in output
    assert without_times(directory) == without_times(undisturbed)


@pytest.mark.slow
def test_continual_starts_antisd_from_a_grpo_policy(world: World) -> None:
    """Weights, optimizer and data position carried over; the gate calibrated afresh; evaluated before the first step."""
    train(2, make_config(world, "grpo", algorithm={"method": "grpo"}))
    train(2, make_config(world, "continual", algorithm={"method": "antisd"}, checkpoint={"continual_from": str(world.root / "grpo")}))
    rows = rows_of(world.root / "continual")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["policy_version"] == STEPS + 1
    assert rows[0]["lambda"] == 0.0 and rows[1]["gate_warm"] is not None
    before, after = without_times(world.root / "grpo"), without_times(world.root / "continual")
    last = [row for row in before if "eval/tiny/avg@1" in row][-1]
    first = next(row for row in after if "eval/tiny/avg@1" in row)
    assert first["step"] == 0 and first["eval/tiny/response_length_mean"] == last["eval/tiny/response_length_mean"]


@pytest.mark.slow
def test_resuming_another_method_is_refused(world: World, undisturbed: Path) -> None:
    raw = yaml.safe_load((world.root / "undisturbed.yaml").read_text())
    raw["algorithm"] = {"method": "grpo"}
    config = write(raw, world.root / "other.yaml")
    before = (undisturbed / "metrics.jsonl").read_bytes()
    with pytest.raises(AssertionError, match="continual_from"):
        train(2, config)
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
