"""Checksums after a load: what goes wrong with weights on their way is found, and named."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")
Q, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module", params=["moe", pytest.param("dense", marks=pytest.mark.slow)])
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "proof_faults.py"), str(tmp_path_factory.mktemp("proof")), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    return {"family": request.param, **json.loads(line.removeprefix("FACTS "))}


def test_every_tensor_of_whole_weights_is_proved(facts: dict[str, Any]) -> None:
    assert facts["whole"] == [] and facts["all"] == {"moe": 69, "dense": 25}[facts["family"]]


@pytest.mark.parametrize(("fault", "named"), [
    ("one_bit", [Q]), ("one_bit_of_a_norm", [NORM]), ("dropped", [NORM]), ("dropped_of_a_stack", [Q]), ("old_value", [Q])])
def test_a_fault_is_found_and_nothing_else_is_named(facts: dict[str, Any], fault: str, named: list[str]) -> None:
    assert facts[fault] == named


def test_two_that_changed_places_are_found(facts: dict[str, Any]) -> None:
    """Experts, and gate and up projection."""
    assert facts["swapped"] == {"moe": [f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in (2, 5)],
                                "dense": [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]}[facts["family"]]


def test_weights_that_were_not_loaded_at_all_are_found(facts: dict[str, Any]) -> None:
    assert len(facts["stale"]) == facts["all"]


def test_a_reload_that_broke_off_leaves_nothing_behind(facts: dict[str, Any]) -> None:
    """Without putting the modules together again vLLM takes the next reload's for complete too early, and drops what comes after."""
    assert facts["after_a_broken_reload"] == []
