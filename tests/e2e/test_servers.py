"""Real runs on real engine servers: two nodes with a server each, and the trainer's two ranks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from calm import assert_same_run, make_config, wait_until
from e2e.serving import nodes, server_pids, server_sections
from started import TORCHRUN, Started, started
from tiny_world import World, rows_of, train, without_times

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")
Sections = dict[str, dict[str, Any]]
FRESH = 2e-5
"""Nats between trainer and engine of tokens that the present weights drew, float32."""


@pytest.fixture(scope="module")
def sections(world: World) -> Sections:
    return server_sections(world.root, 2)


@pytest.fixture(scope="module")
def two(world: World, sections: Sections) -> Iterator[list[Started]]:
    """Two nodes that wait for one trainer after the other."""
    config = make_config(world, world.root / "servers", **sections)
    with nodes(world, config, 2) as running:
        yield running


def steps_done(directory: Path) -> int:
    return len(rows_of(directory)) if (directory / "metrics.jsonl").is_file() else 0


def test_a_run_that_loses_a_server_is_the_run_without_servers(world: World, calm: Path, two: list[Started], sections: Sections) -> None:
    """To the last bit: the other server draws the same tokens, the lost one is started again, gets the weights at the next sync and takes part."""
    directory = world.root / "on_servers"
    config = make_config(world, directory, **sections)
    ranks = ("--standalone", "--nproc-per-node", "2", "-m", "megatron_antisd.train")
    with started(world.root / "on_servers.log", *ranks, str(config), module=TORCHRUN) as run:
        wait_until(run, lambda: steps_done(directory) >= 2)
        (victim,) = server_pids(two[0])
        os.kill(victim, signal.SIGKILL)
        assert run.exit_code() == 0, run.output[-6000:]
    assert_same_run(directory, calm, beyond=("servers", "requests_moved"))
    assert [row["servers"] for row in rows_of(directory)][:2] == [2, 2]
    assert len(server_pids(two[0])) == 2 and "server 0 ended with code -9: starting it again (1 of at most 3 times)" in two[0].output
    assert re.search(r"server http://127\.0\.0\.1:\d+ is gone|is not used any more", run.output)


def test_generation_runs_ahead_within_the_bound(world: World, two: list[Started], sections: Sections) -> None:
    """Long responses are cut by syncs and go on with the new weights; every token says which weights drew it, and those weights did."""
    directory = world.root / "ahead"
    output = train(2, make_config(world, directory, **long_responses(sections, 1)))
    rows = rows_of(directory)
    assert [row["staleness_max"] for row in rows] == [0, 1, 1, 1, 1, 1] and rows[0]["staleness_mean"] == 0
    assert sum(row["continued_rollouts"] for row in rows) > 0, output
    assert all(row["mismatch_fresh_max"] < FRESH for row in rows if row["mismatch_fresh_max"] is not None)
    assert any(row["mismatch_fresh_max"] is not None for row in rows[1:])  # the end of a continued response, by the weights that it trains
    assert all(row["seconds_hidden_generate"] > 0 for row in rows)
    spans = [json.loads((directory / "rollout_versions" / f"step_{step:06d}.json").read_text()) for step in range(1, 7)]
    for step, rollouts in enumerate(spans, start=1):
        assert all(max(0, step - 2) <= version <= step - 1 for rollout in rollouts for version, _ in rollout), step


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_asynchronous_run_can_be_replayed(world: World, two: list[Started], sections: Sections) -> None:
    first, again = world.root / "first", world.root / "again"
    train(2, make_config(world, first, **long_responses(sections, 2)))
    assert sum(row["continued_rollouts"] for row in rows_of(first)) > 0
    train(2, make_config(world, again, **long_responses(sections, 2, replay=str(first))))
    assert_same_run(again, first)
    assert without_times(again) == without_times(first)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trainer_that_is_killed_goes_on_with_the_same_servers(world: World, two: list[Started], sections: Sections) -> None:
    """With requests under way that nobody waits for any more; torchrun starts the ranks again, and the servers take the new trainer."""
    directory = world.root / "killed_trainer"
    config = make_config(world, directory, **long_responses(sections, 1))
    ranks = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "megatron_antisd.train")
    with started(world.root / "killed_trainer.log", *ranks, str(config), module=TORCHRUN) as run:
        wait_until(run, lambda: steps_done(directory) >= 2)
        victim = next(child for child in psutil.Process(run.process.pid).children() if child.environ().get("RANK") == "1")
        victim.kill()
        assert run.exit_code() == 0, run.output[-6000:]
    rows = rows_of(directory)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(row["staleness_max"] <= 1 for row in rows)
    assert all(row["engine_restarts"] == 0 for row in rows) and "resumed from" in run.output


@pytest.mark.slow
def test_waiting_for_responses_under_way_cuts_none(world: World, two: list[Started], sections: Sections) -> None:
    directory = world.root / "finish"
    train(2, make_config(world, directory, **long_responses(sections, 1, partial="finish")))
    assert all(row["continued_rollouts"] == 0 and row["staleness_max"] <= 1 for row in rows_of(directory))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tensor_parallel_server(world: World, calm: Path) -> None:
    """One server of two engine ranks, in processes of their own. Sums are rounded in another order, so the run is not the other one's."""
    sections = server_sections(world.root, 1)
    directory = world.root / "tp2"
    config = make_config(world, directory, **{**sections, "rollout": {**sections["rollout"], "tensor_parallel_size": 2}})
    with nodes(world, config, 1):
        train(2, config)
    assert [row["step"] for row in rows_of(directory)] == [1, 2, 3, 4, 5, 6]
    assert max(row["mismatch_max"] for row in rows_of(directory)) < FRESH
    assert rows_of(directory)[0]["reward_mean"] == pytest.approx(rows_of(calm)[0]["reward_mean"], abs=0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_with_stale_weights_is_found(world: World) -> None:
    """It says that it took the weights of a sync and did not: the checksums stop the run before a step is made of what it draws."""
    sections = server_sections(world.root, 1)
    config = make_config(world, world.root / "lied_to", **sections, run={"name": "lied_to", "steps": 2})
    with started(world.root / "lying.log", str(config), module="tests.e2e.lying_server"):
        with pytest.raises(AssertionError, match=r"does not hold the trainer's weights: .*checksum"):
            train(2, config)
    assert steps_done(world.root / "lied_to") <= 1


def long_responses(sections: Sections, staleness: int, **how: str) -> Sections:
    """Responses that take longer than a step."""
    return {**sections, "rollout": {**sections["rollout"], "max_new_tokens": 200, "ignore_eos": True, "max_sequences": 8},
            "trainer": {"micro_batch_tokens": 1024, "score_micro_batch_tokens": 1024}, "health": {"all_truncated": {"action": "log"}},
            "asynchrony": {"max_staleness": staleness, **how}}
