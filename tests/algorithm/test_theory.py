"""The paper's lemmas, checked in float64 against autograd and explicit probability tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_antisd.algorithm import clipped_surrogate, phi, token_advantage

# float64 rounding through a few logs and sums of at most a dozen terms stays far below this.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}
SEEDS = range(20)


def policies(seed: int, vocabulary: int = 11, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Student logits (a leaf with gradient) and the teacher's constant log-probs, [V] float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    teacher = spread * torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), teacher.log_softmax(-1)


def kl(p_log: Tensor, q_log: Tensor) -> Tensor:
    return (p_log.exp() * (p_log - q_log)).sum()


def jsd(p_log: Tensor, q_log: Tensor) -> Tensor:
    mixture = ((p_log.exp() + q_log.exp()) / 2).log()
    return 0.5 * kl(p_log, mixture) + 0.5 * kl(q_log, mixture)


def policy_gradient(logits: Tensor, reward: Tensor) -> Tensor:
    """E_{v ~ pi_S}[reward_v grad log pi_S(v)] by enumerating the vocabulary."""
    log_prob = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((log_prob.exp().detach() * reward.detach() * log_prob).sum(), logits)
    return gradient


def softplus_reference(u: float) -> float:
    return max(u, 0.0) + math.log1p(math.exp(-abs(u)))


@pytest.mark.parametrize("seed", SEEDS)
def test_lemma_1_gradient_of_the_reverse_kl(seed: int) -> None:
    logits, teacher = policies(seed)
    (expected,) = torch.autograd.grad(kl(logits.log_softmax(-1), teacher), logits)
    u = teacher - logits.detach().log_softmax(-1)
    torch.testing.assert_close(-policy_gradient(logits, u), expected, **TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_minus_phi_ascends_the_jensen_shannon_divergence(seed: int) -> None:
    logits, teacher = policies(seed)
    (expected,) = torch.autograd.grad(jsd(logits.log_softmax(-1), teacher), logits)
    u = teacher - logits.detach().log_softmax(-1)
    torch.testing.assert_close(policy_gradient(logits, -phi(u)), expected, **TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("method", "divergence", "sign"), [("antisd", jsd, 1.0), ("reverse_kl", kl, 1.0), ("sd", kl, -1.0)])
def test_the_loss_moves_the_divergence_the_way_the_method_says(seed: int, method: str, divergence, sign: float) -> None:
    """The code that trains, fed the whole vocabulary with its probabilities as weights: -grad loss = +-lambda grad divergence."""
    logits, teacher = policies(seed)
    lambda_ = 0.37
    (expected,) = torch.autograd.grad(divergence(logits.log_softmax(-1), teacher), logits)
    log_prob = logits.log_softmax(-1)
    a_seq = torch.full_like(teacher, 0.8)  # a baseline: its policy gradient is zero in expectation
    advantage = token_advantage(a_seq, log_prob, teacher, None, method=method, lambda_=lambda_)
    loss, _ = clipped_surrogate(log_prob, None, advantage, log_prob.exp().detach(), 0.2)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(-gradient, sign * lambda_ * expected, **TOLERANCE)


def test_a_small_step_along_minus_phi_raises_the_divergence() -> None:
    for seed in SEEDS:
        logits, teacher = policies(seed)
        log_prob = logits.detach().log_softmax(-1)
        direction = policy_gradient(logits, -phi(teacher - log_prob))
        moved = (logits.detach() + 1e-4 * direction / direction.norm()).log_softmax(-1)
        assert jsd(moved, teacher) > jsd(log_prob, teacher)


def test_lemma_4_derivative_of_the_generator() -> None:
    u = torch.linspace(-12, 12, 481, dtype=torch.float64)
    r = (-u).exp().requires_grad_()
    f = r / 2 * (2 * r / (1 + r)).log() + 0.5 * (2 / (1 + r)).log()
    (derivative,) = torch.autograd.grad(f.sum(), r)
    torch.testing.assert_close(derivative, -phi(u), rtol=1e-10, atol=1e-10)  # f cancels two logs of up to 12 for extreme r


def test_lemma_4_generator_gives_the_divergence() -> None:
    logits, teacher = policies(3)
    student = logits.detach().log_softmax(-1)
    r = (student - teacher).exp()
    f = r / 2 * (2 * r / (1 + r)).log() + 0.5 * (2 / (1 + r)).log()
    torch.testing.assert_close((teacher.exp() * f).sum(), jsd(student, teacher), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lemma_5_zero_bound_and_values(dtype: torch.dtype) -> None:
    assert phi(torch.zeros(3, dtype=dtype)).tolist() == [0.0, 0.0, 0.0]
    points = [-800.0, -40.0, -20.001, -5.0, -1e-3, 1e-3, 2.0, 19.999, 20.001, 40.0, 5000.0]
    expected = torch.tensor([0.5 * (softplus_reference(u) - math.log(2.0)) for u in points], dtype=dtype)
    rtol, atol = (1e-15, 1e-15) if dtype == torch.float64 else (2e-7, 6e-8)
    torch.testing.assert_close(phi(torch.tensor(points, dtype=dtype)), expected, rtol=rtol, atol=atol)
    assert (phi(torch.tensor(points, dtype=torch.float64)) >= -0.5 * math.log(2.0)).all()
    assert -phi(torch.tensor(-800.0, dtype=torch.float64)).item() == pytest.approx(0.34657359027997264, abs=1e-16)


def test_lemma_5_slope_and_monotonicity() -> None:
    u = torch.linspace(-30, 60, 9001, dtype=torch.float64, requires_grad=True)
    value = phi(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    torch.testing.assert_close(slope, torch.sigmoid(u.detach()) / 2, rtol=1e-12, atol=1e-15)
    assert (value.detach().diff() > 0).all()
    assert (slope > 0).all() and (slope <= 0.5).all()


def test_phi_keeps_shape_and_dtype() -> None:
    assert phi(torch.zeros(2, 3)).shape == (2, 3)
    assert phi(torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_lemma_3_telescopes_on_one_joint_table(seed: int) -> None:
    """p(c, y1, y2, y3) as an explicit table: sum_t u_t = log p(c | y) - log p(c), where the student marginalises c."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(3, 4, 5, 2, generator=generator, dtype=torch.float64) + 1e-3
    joint = table / table.sum()  # [c, y1, y2, y3]
    marginal = joint.sum(0)
    total = torch.zeros_like(joint)
    for prefix, present in (((), (0,)), ((0,), (0, 1)), ((0, 1), (0, 1, 2))):
        def keep(p: Tensor, axes: tuple[int, ...], first: int) -> Tensor:
            summed = tuple(first + axis for axis in range(3) if axis not in axes)
            return p.sum(summed, keepdim=True) if summed else p
        student = keep(marginal, present, 0) / keep(marginal, prefix, 0)
        teacher = keep(joint, present, 1) / keep(joint, prefix, 1)
        total = total + (teacher.log() - student.log().unsqueeze(0))
    prior = joint.sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(total, (joint / marginal).log() - prior.log(), **TOLERANCE)
