"""Weights from two trainer ranks (TP2, EP2) to two engine processes (TP1, TP2), and what happens where somebody stalls or stays away."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")

# Mean |engine - transformers| log-prob in nats, tiny random models in float32. Measured: 1e-6 to 2e-6; with other weights 2 and more.
AGREES = 1e-4


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("process_group", "shared_memory")])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sync")
    run_ranks(HERE / "sync_ranks.py", 2, str(folder), request.param, timeout=400)
    return [json.loads((folder / f"facts_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_engines_in_the_trainers_processes_hold_what_they_need(tmp_path: Path) -> None:
    """Slices, whole experts, and OLMo-3's norms; every tensor's checksum, which is another one after an update."""
    run_ranks(HERE / "colocated_sync_ranks.py", 2, str(tmp_path), timeout=400)
    for rank in range(2):
        for name, found in json.loads((tmp_path / f"facts_{rank}.json").read_text()).items():
            assert found["problems"] == [] and found["names"] > 30
            assert all(count == found["names"] for count in found["held"]) != (name == "moe, whole experts")
            named = [text.partition(":")[0] for text in found["after_an_update"]]
            assert named == [f"model.embed_tokens.weight on engine rank {r}" for r in range(2)]


@pytest.mark.parametrize("sync", ["first", "second"])
def test_every_server_gets_the_weights_and_its_checksums_are_the_trainers(facts: list[dict[str, Any]], sync: str) -> None:
    for found in facts:
        assert found[sync]["failures"] == found[sync]["mismatches"] == {}
        assert len(found[sync]["checked"]) == 12
    assert max(facts[0][f"{sync}_differences"]) < AGREES


def test_syncs_check_other_tensors_each_time(facts: list[dict[str, Any]]) -> None:
    assert facts[0]["first"]["checked"] != facts[0]["second"]["checked"]


def test_a_trainer_that_does_not_come_leaves_the_old_weights_whole(facts: list[dict[str, Any]]) -> None:
    for errors in facts[0]["nobody_sends"]["errors"].values():
        assert all(error.startswith("TransferError: ") and "engine rank" in error and "within 8 s" in error for error in errors)
    assert max(facts[0]["old_weights_whole"]) < AGREES


def test_a_server_that_stays_away_is_named_and_holds_no_other_up(facts: list[dict[str, Any]]) -> None:
    for found in facts:
        assert list(found["one_is_absent"]["failures"]) == ["two"]
        assert "engine rank 0 of two" in found["one_is_absent"]["failures"]["two"]
    assert facts[0]["the_other_has_it"] < AGREES


def test_a_stall_in_the_middle_is_named_and_tears_one_engine_alone(facts: list[dict[str, Any]]) -> None:
    for found in facts:
        stalled = found["stall"]["stalled"]
        assert list(stalled["failures"]) == ["one"]
        assert "engine rank 0 of one" in stalled["failures"]["one"] and "part " in stalled["failures"]["one"]
        assert stalled["errors"]["two"] == [None, None]
        (error,) = stalled["errors"]["one"]
        assert re.search(r"part \d+ of \d+", error) and "trainer rank 1 sent nothing within 8 s" in error
    (state,) = facts[0]["stall"]["state"]["answer"]
    assert state["version"] is None and state["torn"].startswith("sync 5 to version 4 broke off")
    assert facts[0]["stall"]["the_other_has_it"] < AGREES


def test_a_torn_engine_is_whole_after_the_next_sync(facts: list[dict[str, Any]]) -> None:
    again = facts[0]["stall"]["again"]
    assert again["failures"] == again["mismatches"] == {}
    assert max(facts[0]["stall"]["again_differences"]) < AGREES
