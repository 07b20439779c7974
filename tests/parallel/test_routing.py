"""Given experts on every layout, forward and backward, against transformers in float64 whose routers are made to take the same.

fp32 on gloo. Tolerances are about ten times what was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import make_checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from layout_ranks import make_batch
from routed import EXPERTS, LAYERS, Oracle, ask, routed_views, unrouted

SCRIPT = Path(__file__).with_name("routing_ranks.py")
SCORE, LOSS, GRADIENT = 2e-5, 2e-5, 1e-4
EQUAL = 0.01  # of a share: a trunk's tokens count once in a row, and once for each view in the oracle

TP, PP, VPP = "parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"
EP, ETP, CP = "parallel.expert_parallel_size=2", "parallel.expert_tensor_parallel_size=2", "parallel.context_parallel_size=2"
FULL = "model.recompute=full"


def selective(*parts: str) -> str:
    return f"model.recompute=selective model.recompute_modules=[{','.join(parts)}]"


CASES = {
    "one": ["parallel.distributed_optimizer=false", FULL],
    "two": [f"{TP} {EP}", f"{EP} {selective('mlp')}", f"{PP} {FULL}", f"{PP} {VPP} {FULL}", f"{PP} {VPP} {selective('attention', 'mlp', 'norms')}",
            f"{CP} {EP}"],
    "two, others": [EP, f"{TP} {ETP} parallel.distributed_optimizer=false", PP, f"{PP} {VPP}", f"{TP} {EP} {FULL} trainer.micro_batch_tokens=4096"],
    "four": [f"{TP} {PP} {VPP} {EP} {FULL}", f"{TP} {CP} parallel.expert_parallel_size=4", f"{PP} {CP} {FULL}", f"{PP} {EP} {selective('mlp')}",
        f"{TP} {EP} {ETP}", f"{TP} {PP}", f"{PP} {VPP} {CP} {EP}", f"{TP} {EP}"],
}
"""Layouts of one run. The rows of these runs hold about three views, so that there are several micro-batches, some with a shared trunk."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("routing") / "moe", moe=True, num_experts=EXPERTS)


@pytest.fixture(scope="module")
def oracles(checkpoint: Path) -> tuple[Oracle, Oracle]:
    """With the given experts, and with those that the routers choose."""
    views = routed_views()
    return ask(checkpoint, views, make_batch(views, 0)), ask(checkpoint, unrouted(views), make_batch(views, 0))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "two" else pytest.mark.slow) for name in CASES])
def test_every_layout_follows_given_experts(checkpoint: Path, oracles: tuple[Oracle, Oracle], tmp_path: Path, name: str) -> None:
    torch.save(oracles, tmp_path / "oracles.pt")
    ranks = {"one": 1, "four": 4}.get(name, 2)
    run_ranks(SCRIPT, ranks, str(checkpoint), str(tmp_path / "oracles.pt"), str(tmp_path / "facts.json"), *CASES[name], timeout=400)
    facts: dict[str, dict[str, Any]] = json.loads((tmp_path / "facts.json").read_text())
    assert list(facts) == CASES[name]
    for case, found in facts.items():
        for name, bound in {"score": SCORE, "step": SCORE, "free": SCORE, "replay_of_own": SCORE, "loss": LOSS, "gradient": GRADIENT,
                            "router_gradient": GRADIENT, "equal": EQUAL}.items():
            assert found[name] <= bound, f"{case}: {name} {found}"
        assert (found["recorded_others"], found["recorded_again"], found["left"]) == (0, True, 0), f"{case}: {found}"
        assert found["tensors"] == len(oracles[0].gradients) - 2 * LAYERS + 3 * EXPERTS * LAYERS  # experts stand one by one in a checkpoint
        check_refusals(found["refused"])
        for by_step, by_score, unmoved in found["deaf"]:
            assert "did not ask for the experts that were given" in by_step == by_score and unmoved, "raised on every rank, before the update"


def check_refusals(refused: dict[str, str]) -> None:
    """Each names the view, what was got and what was expected."""
    assert set(refused) == {"length", "layers", "top_k", "twice", "far"}, refused
    assert all(message.startswith("view 1: ") for message in refused.values())
    assert "tokens, expected" in refused["length"] and "3 layers" in refused["layers"] and "3 experts a token" in refused["top_k"]
    assert "token 3 has an expert twice in layer 2" in refused["twice"]
    assert f"token 4 goes to expert {EXPERTS} in layer 1, the model has 0 to {EXPERTS - 1}" in refused["far"]


def test_given_experts_matter(oracles: tuple[Oracle, Oracle]) -> None:
    """The comparisons above mean something only where other experts give other scores and gradients."""
    forced, free = oracles
    assert (forced.log_prob - free.log_prob).abs().mean() > 1000 * SCORE
    for name, gradient in free.gradients.items():
        if name.endswith("mlp.gate.weight"):
            assert (forced.gradients[name] - gradient).norm() > 1000 * GRADIENT * gradient.norm(), name
