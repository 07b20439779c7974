"""Importance weights by hand, against autograd in float64, and what they are for: a gradient without the engine's bias."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_antisd.algorithm import clipped_surrogate, importance_weights, sequence_log_ratio

BOUNDS = {"lower": 0.5, "upper": 2.0}


def test_weights_by_hand() -> None:
    ratios = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 8.0], dtype=torch.float64)
    truncated = importance_weights(ratios.log(), mode="truncate", **BOUNDS)
    assert truncated.weight.tolist() == pytest.approx([0.1, 0.5, 1.0, 1.5, 2.0, 2.0])
    assert truncated.touched.tolist()[:4] == [False] * 4 and truncated.touched[5]
    masked = importance_weights(ratios[[0, 2, 3, 5]].log(), mode="mask", **BOUNDS)
    assert masked.weight.tolist() == pytest.approx([0.0, 1.0, 1.5, 0.0]) and masked.touched.tolist() == [True, False, False, True]
    exact = importance_weights(torch.zeros(3), mode="truncate", **BOUNDS)
    assert exact.weight.tolist() == [1.0] * 3 and not exact.touched.any(), "no mismatch, no weight"


def test_far_off_and_broken_values() -> None:
    """A ratio that overflows is bounded; a NaN stays one and is no masked token."""
    for mode, expected in (("truncate", [2.0, 0.0]), ("mask", [0.0, 0.0])):
        weights = importance_weights(torch.tensor([1000.0, -1000.0, float("nan")]), mode=mode, **BOUNDS)
        assert weights.weight[:2].tolist() == expected and weights.weight[2].isnan() and not weights.touched[2]


@pytest.mark.parametrize("bounds", [{"lower": 1.0, "upper": 2.0}, {"lower": 0.5, "upper": 1.0}, {"lower": -0.1, "upper": 2.0}])
def test_bounds_must_enclose_one(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="lower < 1 < upper"):
        importance_weights(torch.zeros(1), mode="mask", **bounds)
    with pytest.raises(ValueError, match="mode is 'off'"):
        importance_weights(torch.zeros(1), mode="off", **BOUNDS)  # type: ignore[arg-type]


def test_a_response_has_one_ratio() -> None:
    log_ratio = torch.tensor([0.1, 0.2, -0.5, 0.3, 0.4, -0.1], dtype=torch.float32, requires_grad=True)
    whole = sequence_log_ratio(log_ratio, [2, 1, 3])
    assert whole.tolist() == pytest.approx([0.3, 0.3, -0.5, 0.6, 0.6, 0.6], abs=1e-7) and not whole.requires_grad
    with pytest.raises(ValueError, match=r"expected \(5,\) from 2 responses"):
        sequence_log_ratio(log_ratio, [2, 3])


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 12])
def test_loss_and_gradient_against_autograd_in_float64(mode: str, sequences: bool, parts: int) -> None:
    """The whole loss written out from logits, in one piece; ours in `parts` pieces. The denominator counts masked tokens, too."""
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 5, 4]
    total = sum(lengths)
    logits = torch.randn(total, 7, generator=generator, dtype=torch.float64).requires_grad_()
    chosen = torch.randint(0, 7, (total, 1), generator=generator)
    engine = logits.detach().log_softmax(-1).gather(1, chosen)[:, 0] + 0.5 * torch.randn(total, generator=generator, dtype=torch.float64)
    advantage = torch.randn(total, generator=generator, dtype=torch.float64)
    log_prob = logits.log_softmax(-1).gather(1, chosen)[:, 0]
    weights = []
    for own, whole in zip((log_prob - engine).tolist(), sequence_log_ratio(log_prob - engine, lengths).tolist(), strict=True):
        ratio = math.exp(whole if sequences else own)
        weights.append(min(ratio, 2.0) if mode == "truncate" else ratio if 0.5 <= ratio <= 2.0 else 0.0)
    expected = -(torch.tensor(weights, dtype=torch.float64) * advantage * log_prob).sum() / total
    (gradient,) = torch.autograd.grad(expected, logits)

    log_prob = logits.log_softmax(-1).gather(1, chosen)[:, 0]
    ratio = log_prob.detach() - engine
    ratio = sequence_log_ratio(ratio, lengths) if sequences else ratio
    per_token = torch.full((total,), 1 / total, dtype=torch.float64)
    loss = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(total).chunk(parts):
        corrected = importance_weights(ratio[rows], mode=mode, **BOUNDS).weight  # type: ignore[arg-type]
        loss = loss + clipped_surrogate(log_prob[rows], None, advantage[rows], per_token[rows] * corrected, 0.2).loss
    (ours,) = torch.autograd.grad(loss, logits)
    assert len(set(weights)) > 1 and any(w in (0.0, 2.0) for w in weights), "some tokens are touched, some are not"
    torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-15)


def test_weights_remove_the_bias_of_the_engines_distribution() -> None:
    """Exactly, on a small vocabulary: E_mu[w A grad log pi] = E_pi[A grad log pi] where no bound is met; without weights it is another vector."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    pi = logits.softmax(-1)
    mu = (logits.detach() + 0.2 * torch.randn(6, generator=generator, dtype=torch.float64)).softmax(-1)
    advantage = torch.randn(6, generator=generator, dtype=torch.float64)
    (right,) = torch.autograd.grad((pi.detach() * advantage * pi.log()).sum(), logits, retain_graph=True)
    weights = importance_weights(pi.log() - mu.log(), mode="truncate", **BOUNDS)
    assert not weights.touched.any()
    (corrected,) = torch.autograd.grad((mu * weights.weight * advantage * pi.log()).sum(), logits, retain_graph=True)
    (uncorrected,) = torch.autograd.grad((mu * advantage * pi.log()).sum(), logits)
    torch.testing.assert_close(corrected, right, rtol=1e-12, atol=1e-15)
    assert (uncorrected - right).norm() > 0.05 * right.norm()
