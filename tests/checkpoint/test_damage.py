"""Damaged checkpoints of every kind are found out before anything is loaded, with a message that names the file and the way on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint.damage import CASES, NEWEST, WHOLE
from distributed import run_ranks
from tiny import make_checkpoint

from megatron_antisd.convert.to_megatron import convert_to_megatron

HERE = Path(__file__).parent
LAYOUT = ("model.dtype=float32", "parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2")
WAY_ON = ("take another one", "use the version", "another run.name", "model.path=", "give the model", "Give the model")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three checkpoints written by two ranks, one of another model beside them, and what came of every damage."""
    root = tmp_path_factory.mktemp("damage")
    saved = root / "saved"
    for name, changes in (("model", {}), ("other", {"moe_intermediate_size": 32})):
        make_checkpoint(root / name, moe=True, **changes)
        directory = saved if name == "model" else root / "strangers"
        run_ranks(HERE.parent / "parallel" / "checkpoint_ranks.py", 2, str(root / name), str(directory), str(root / "unused.pt"), "0", "4", "-",
                  *LAYOUT)
    shutil.copytree(root / "strangers" / NEWEST, saved / "of_another_model")
    convert_to_megatron(root / "model", saved / "converted")
    run_ranks(HERE / "damage_ranks.py", 2, str(root / "model"), str(saved), str(root / "outcomes.json"), *LAYOUT)
    return json.loads((root / "outcomes.json").read_text())


def test_there_are_enough_kinds() -> None:
    assert len(CASES) >= 20


@pytest.mark.parametrize("name", list(CASES))
def test_damage_is_found_and_named(outcomes: dict[str, Any], name: str) -> None:
    _, names, expected = CASES[name]
    outcome, said = outcomes[name], "\n".join(outcomes[name]["said"])
    if expected == WHOLE:
        assert outcome["found"] == NEWEST and outcome["step"] == 4 and not said
        return
    assert outcome["found"] == expected and names in said, said
    assert any(word in said for word in WAY_ON), said
    if expected != "refused":
        assert outcome["step"] == int(expected[-1]) and "falling back to" in said and expected in said
