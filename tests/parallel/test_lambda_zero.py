"""lambda = 0 is plain GRPO to the last bit, in whatever method (invariant 5), and so is GRPO with AntiSD in its shadow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from tiny import make_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from lambda_zero_ranks import RUNS

SCRIPT = Path(__file__).with_name("lambda_zero_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list, dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("lambda_zero")
    run_ranks(SCRIPT, 1, str(make_checkpoint(root / "moe", moe=True)), str(root / "result.pt"))
    return torch.load(root / "result.pt")


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("grpo", "antisd-at-work")])
def test_updates_are_bitwise_those_of_grpo(results: dict, name: str) -> None:
    (steps, weights), (reference_steps, reference) = results[name], results["grpo"]
    assert steps == reference_steps and not any(skipped for _, _, skipped in steps)
    assert weights.keys() == reference.keys()
    for key, tensor in weights.items():
        assert torch.equal(tensor, reference[key]), key


def test_lambda_above_zero_is_not(results: dict) -> None:
    """Or the comparison above would prove nothing."""
    (steps, weights), (reference_steps, reference) = results["antisd-at-work"], results["grpo"]
    assert steps[0] != reference_steps[0]
    assert all(not torch.equal(tensor, reference[key]) for key, tensor in weights.items())


def test_without_a_gradient_weight_decay_alone_moves_matrices_and_no_norms(results: dict) -> None:
    """AdamW: w (1 - lr wd), lr 1e-2 and wd 0.5 here. Norm weights are one-dimensional and spared."""
    before, after = results["decay"]
    norms = {key for key in before if "norm" in key}
    assert norms and len(norms) < len(before)
    for key, tensor in before.items():
        expected = tensor if key in norms else tensor * (1 - 1e-2 * 0.5)
        torch.testing.assert_close(after[key], expected, rtol=1e-6, atol=1e-8)
