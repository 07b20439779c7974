"""The clipped surrogate and its weights: values by hand, gradients against autograd, invariance to splitting."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from megatron_antisd.algorithm import clipped_surrogate, token_weights

CLIP = 0.2


def random_batch(seed: int, count: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-probs (leaf), old log-probs, advantages, weights: [T] float64; about half of the ratios lie outside the clip range."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = torch.randn(4, count, generator=generator, dtype=torch.float64)
    log_prob = -3 * a.abs()
    return log_prob.clone().requires_grad_(), log_prob + 0.3 * b, c, d.abs() / count


# ------------------------------------------------------------------ the weights

def test_weights_by_hand() -> None:
    mask = torch.tensor([True, False, True])
    assert token_weights([2, 3, 4], mask, "token_mean").tolist() == pytest.approx([1 / 6] * 2 + [0.0] * 3 + [1 / 6] * 4, rel=1e-7)
    assert token_weights([2, 3, 4], mask, "sequence_mean").tolist() == pytest.approx([1 / 4] * 2 + [0.0] * 3 + [1 / 8] * 4, rel=1e-7)
    assert token_weights([2], torch.tensor([True]), "token_mean").dtype == torch.float32


@pytest.mark.parametrize("seed", range(20))
def test_weighted_sums_are_the_global_means(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 12))]
    kept = [draw.random() < 0.7 for _ in lengths]
    kept[draw.randrange(len(kept))] = True
    losses = [torch.tensor([draw.gauss(0, 1) for _ in range(n)], dtype=torch.float64) for n in lengths]
    inside = [loss for loss, keep in zip(losses, kept, strict=True) if keep]
    expected = {"token_mean": torch.cat(inside).mean(), "sequence_mean": torch.stack([loss.mean() for loss in inside]).mean()}
    for mode, mean in expected.items():
        got = (token_weights(lengths, torch.tensor(kept), mode).double() * torch.cat(losses)).sum()
        torch.testing.assert_close(got, mean, rtol=1e-6, atol=1e-6)  # the weights are rounded to float32


def test_each_weight_is_the_rounded_quotient_of_integers() -> None:
    weight = token_weights([7] * 30000, torch.ones(30000, dtype=torch.bool), "token_mean")
    assert weight.unique().tolist() == [torch.tensor(1 / 210000, dtype=torch.float64).float().item()]


@pytest.mark.parametrize(("lengths", "mask", "mode", "words"), [
    ([2, 3], torch.tensor([False, False]), "token_mean", "none of the 2 responses"),
    ([], torch.ones(0).bool(), "token_mean", "none of the 0"),
    ([2, 0], torch.tensor([True, True]), "token_mean", "at least 1 token"),
    ([2, 3], torch.tensor([True]), "token_mean", r"expected \(2,\)"),
    ([2, 3], torch.ones(2), "token_mean", "torch.bool"), ([2], torch.tensor([True]), "mean", "loss mode is 'mean'"),
])
def test_weights_refuse(lengths: list[int], mask: Tensor, mode: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_weights(lengths, mask, mode)


# ------------------------------------------------------------------ the surrogate

@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), [
    (1.0, 2.0, -2.0, -2.0, 0), (1.1, 2.0, -2.2, -2.2, 0), (1.5, 2.0, -2.4, 0.0, 1), (0.5, 2.0, -1.0, -1.0, 0),
    (1.0, -2.0, 2.0, 2.0, 0), (1.5, -2.0, 3.0, 3.0, 0), (0.5, -2.0, 1.6, 0.0, 1), (0.9, -2.0, 1.8, 1.8, 0), (1.5, 0.0, 0.0, 0.0, 0),
])
def test_one_token_by_hand(ratio: float, advantage: float, loss: float, slope: float, clipped: int) -> None:
    """slope is d loss / d log_prob = -r A where nothing is clipped."""
    log_prob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64)
    got = clipped_surrogate(log_prob, old, torch.tensor([advantage], dtype=torch.float64), torch.ones(1, dtype=torch.float64), CLIP)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(loss, abs=1e-14)
    assert log_prob.grad.item() == pytest.approx(slope, abs=1e-14)
    assert got.clipped_count.item() == clipped


@pytest.mark.parametrize("seed", range(20))
def test_against_a_loop_and_the_analytic_gradient(seed: int) -> None:
    log_prob, old, advantage, weight = random_batch(seed)
    got = clipped_surrogate(log_prob, old, advantage, weight, CLIP)
    (gradient,) = torch.autograd.grad(got.loss, log_prob)
    total, slopes, clipped = 0.0, [], 0
    for lp, o, a, w in zip(log_prob.tolist(), old.tolist(), advantage.tolist(), weight.tolist(), strict=True):
        r = math.exp(lp - o)
        stopped = (a > 0 and r > 1 + CLIP) or (a < 0 and r < 1 - CLIP)
        total -= w * min(r * a, min(max(r, 1 - CLIP), 1 + CLIP) * a)
        slopes.append(0.0 if stopped else -w * r * a)
        clipped += stopped
    assert got.loss.item() == pytest.approx(total, abs=1e-13)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert got.clipped_count.item() == clipped > 0


def test_gradient_against_finite_differences() -> None:
    log_prob, old, advantage, weight = random_batch(1)
    assert torch.autograd.gradcheck(lambda lp: clipped_surrogate(lp, old, advantage, weight, CLIP).loss, (log_prob,), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_is_the_plain_policy_gradient(dtype: torch.dtype) -> None:
    log_prob, _, advantage, weight = (t.detach().to(dtype) for t in random_batch(2))
    log_prob.requires_grad_()
    got = clipped_surrogate(log_prob, None, advantage, weight, CLIP)
    got.loss.backward()
    assert torch.equal(log_prob.grad, -(weight * advantage))  # bitwise: the ratio is exactly 1
    assert torch.equal(got.loss.detach(), -(weight * advantage).sum())
    assert got.clipped_count.item() == 0
    same = clipped_surrogate(log_prob, log_prob.detach().clone(), advantage, weight, CLIP)
    assert torch.equal(same.loss, got.loss)


def test_constants_get_no_gradient() -> None:
    log_prob, old, advantage, weight = random_batch(3)
    old.requires_grad_(), advantage.requires_grad_()
    clipped_surrogate(log_prob, old, advantage, weight, CLIP).loss.backward()
    assert old.grad is None and advantage.grad is None


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("seed", range(10))
def test_any_split_gives_the_same_loss_and_gradient(mode: str, seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, 9) for _ in range(8)]
    log_prob, old, advantage, _ = random_batch(seed, sum(lengths))
    weight = token_weights(lengths, torch.tensor([draw.random() < 0.8 for _ in range(7)] + [True]), mode).double()
    whole = clipped_surrogate(log_prob, old, advantage, weight, CLIP)
    (expected,) = torch.autograd.grad(whole.loss, log_prob)
    order = list(range(len(log_prob)))
    draw.shuffle(order)  # tokens may land in any part, in any order, and a part may be empty
    cuts = sorted(draw.choices(range(len(order) + 1), k=4))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    leaf = log_prob.detach().clone().requires_grad_()
    loss, clipped = 0.0, 0
    for part in parts:
        index = torch.tensor(part, dtype=torch.long)
        got = clipped_surrogate(leaf[index], old[index], advantage[index], weight[index], CLIP)
        got.loss.backward()  # micro-batches accumulate
        loss, clipped = loss + got.loss.item(), clipped + got.clipped_count.item()
    assert loss == pytest.approx(whole.loss.item(), abs=1e-14)
    assert clipped == whole.clipped_count.item()
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("hole", [math.nan, math.inf])
def test_tokens_out_of_the_loss_take_no_part(hole: float) -> None:
    log_prob, old, advantage, weight = (t.detach() for t in random_batch(4))
    out = torch.arange(30) % 4 == 0
    kept = clipped_surrogate(log_prob[~out], old[~out], advantage[~out], weight[~out], CLIP)
    leaf = log_prob.clone().requires_grad_()
    weight = torch.where(out, 0.0, weight)
    got = clipped_surrogate(leaf, torch.where(out, hole, old), torch.where(out, hole, advantage), weight, CLIP)
    got.loss.backward()
    assert got.loss.item() == pytest.approx(kept.loss.item(), abs=1e-14)
    assert got.clipped_count.item() == kept.clipped_count.item()
    assert torch.equal(leaf.grad[out], torch.zeros(int(out.sum()), dtype=torch.float64))
    assert leaf.grad.isfinite().all()


def test_a_nan_inside_the_loss_is_not_hidden() -> None:
    log_prob, old, advantage, weight = (t.detach() for t in random_batch(5))
    for place in range(3):
        tensors = [log_prob.clone(), old.clone(), advantage.clone()]
        tensors[place][3] = math.nan
        assert clipped_surrogate(*tensors, weight, CLIP).loss.isnan()


def test_no_tokens_give_zero_with_a_gradient_path() -> None:
    leaf = torch.zeros(0, requires_grad=True)
    got = clipped_surrogate(leaf, None, torch.zeros(0), torch.zeros(0), CLIP)
    got.loss.backward()
    assert got.loss.item() == 0.0 and got.clipped_count.item() == 0


def test_the_surrogate_refuses() -> None:
    good = torch.zeros(3)
    for clip in (0.0, 1.0, -0.2, math.nan):
        with pytest.raises(ValueError, match="clip is"):
            clipped_surrogate(good, None, good, good, clip)
    for place, name in ((1, "old_log_prob"), (2, "advantage"), (3, "weight")):
        given = [good, good, good, good]
        given[place] = torch.zeros(1)  # would broadcast silently
        with pytest.raises(ValueError, match=f"{name} has shape"):
            clipped_surrogate(*given, CLIP)
