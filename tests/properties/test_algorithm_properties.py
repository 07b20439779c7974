"""The advantage and the loss over drawn numbers."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_antisd.algorithm import clipped_surrogate, group_advantage, phi, token_advantage, token_weights

LOG_PROB = st.floats(-60, 0)
REWARD = st.sampled_from([0.0, 1.0]) | st.floats(-10, 10, width=32)


def doubles(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(values=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=30))
def test_phi_is_bounded_below_rises_and_never_faster_than_half_its_argument(values: list[float]) -> None:
    u = doubles(sorted(values))
    found = phi(u)
    assert (found >= -0.5 * math.log(2.0) - 1e-15).all()
    assert (found <= 0.5 * u.clamp(min=0) + 1e-12).all() and (found >= 0.5 * (u - math.log(2.0)) - 1e-9).all()
    rise, run = found.diff(), u.diff()
    assert (rise >= -1e-12).all() and (rise <= 0.5 * run + 1e-9).all()
    assert (found.sign() == u.sign())[u.abs() > 1e-12].all()


@given(rewards=st.lists(REWARD, min_size=2, max_size=20), shift=st.floats(-5, 5), unbiased=st.booleans(), data=st.data())
def test_a_groups_advantage_is_centred_bounded_and_of_no_order(rewards: list[float], shift: float, unbiased: bool, data: st.DataObject) -> None:
    std = "unbiased" if unbiased else "biased"
    found = group_advantage(doubles(rewards), std=std)
    size = len(rewards)
    assert abs(float(found.sum())) < 1e-6 * size
    # One reward apart from equal ones is the extreme: (G - 1) / sqrt(G), or sqrt(G - 1) with the biased deviation.
    assert float(found.abs().max()) <= ((size - 1) / math.sqrt(size) if unbiased else math.sqrt(size - 1)) + 1e-9
    order = data.draw(st.permutations(range(size)))
    torch.testing.assert_close(group_advantage(doubles(rewards)[order], std=std), found[order], atol=1e-6, rtol=1e-6)
    # (Nearly equal rewards are left out: a shift rounds their differences.)
    if max(rewards) - min(rewards) > 1e-3:
        torch.testing.assert_close(group_advantage(doubles(rewards) + shift, std=std), found, atol=1e-6, rtol=1e-6)
        assert (found[doubles(rewards).argsort()].diff() >= -1e-12).all(), "a better reward is no worse an advantage"
    else:
        assert len(set(rewards)) > 1 or not found.any()


TOKENS = st.lists(st.tuples(st.floats(-3, 3), LOG_PROB, LOG_PROB, st.booleans()), min_size=1, max_size=20)


@given(tokens=TOKENS, lambda_=st.floats(0, 5), method=st.sampled_from(["grpo", "sd", "antisd", "reverse_kl", "no_teacher"]))
def test_token_advantages_stay_within_their_bounds(tokens: list[tuple[float, float, float, bool]], lambda_: float, method: str) -> None:
    a_seq, student, teacher = (doubles([token[i] for token in tokens]) for i in range(3))
    mask = torch.tensor([token[3] for token in tokens])
    holes = torch.where(mask, teacher, torch.nan)
    found = token_advantage(a_seq, student, holes, mask, method=method, lambda_=lambda_)
    assert found.isfinite().all() and found.shape == a_seq.shape
    if method == "grpo" or lambda_ == 0:
        assert torch.equal(found, a_seq)
        return
    if method == "no_teacher":
        assert (found <= a_seq + 1e-12).all(), "-s_t is never negative, so the term only punishes"
        return
    assert torch.equal(found[~mask], a_seq[~mask])
    if method == "antisd":
        assert (found <= a_seq + 0.5 * math.log(2.0) * lambda_ + 1e-9).all()
        assert (found >= a_seq - 0.5 * lambda_ * (teacher - student).clamp(min=0) - 1e-9).all()
    opposite = {"sd": "reverse_kl", "reverse_kl": "sd"}.get(method)
    if opposite is not None:
        mirrored = token_advantage(a_seq, student, holes, mask, method=opposite, lambda_=lambda_)
        torch.testing.assert_close(found + mirrored, 2 * a_seq, atol=1e-9, rtol=1e-12)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), mode=st.sampled_from(["token_mean", "sequence_mean"]), data=st.data())
def test_weights_sum_to_one_and_a_split_changes_nothing(lengths: list[int], mode: str, data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)).filter(any)))
    weights = token_weights(lengths, mask, mode)
    assert abs(float(weights.double().sum()) - 1) < 1e-5
    assert not weights[~mask.repeat_interleave(torch.tensor(lengths))].any()
    seed, cut = data.draw(st.integers(0, 1000)), data.draw(st.integers(0, len(weights)))
    generator = torch.Generator().manual_seed(seed)
    log_prob, old, advantage = (torch.randn(len(weights), generator=generator, dtype=torch.float64) for _ in range(3))
    whole = clipped_surrogate(log_prob, old, advantage, weights, 0.2)
    parts = [clipped_surrogate(log_prob[part], old[part], advantage[part], weights[part], 0.2) for part in (slice(cut), slice(cut, None))]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, atol=1e-12, rtol=1e-12)
    assert int(parts[0].clipped_count + parts[1].clipped_count) == int(whole.clipped_count)
