"""Group and token advantages against formulas written out by hand."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from megatron_antisd.algorithm import group_advantage, soft_overlong_penalty, token_advantage

LAMBDA = 0.5


# ------------------------------------------------------------------ the group

@pytest.mark.parametrize("std", ["unbiased", "biased"])
def test_group_advantage_against_the_statistics_module(std: str) -> None:
    deviation = statistics.stdev if std == "unbiased" else statistics.pstdev
    draw = random.Random(0)
    for _ in range(100):
        rewards = [draw.choice([0.0, 0.25, 1.0, draw.gauss(0, 3)]) for _ in range(draw.randint(2, 16))]
        if len(set(rewards)) == 1:
            continue
        expected = [(r - statistics.mean(rewards)) / (deviation(rewards) + 1e-6) for r in rewards]
        got = group_advantage(torch.tensor(rewards, dtype=torch.float64), std=std)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_group_advantage_by_hand() -> None:
    # mean 1/4; unbiased deviation sqrt((1/4 * 3/4) * 4/3) = 1/2
    got = group_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([0.75 / 0.500001, *[-0.25 / 0.500001] * 3], abs=1e-15)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e12])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    for dtype in (torch.float32, torch.float64):
        assert group_advantage(torch.full((size,), value, dtype=dtype)).tolist() == [0.0] * size


def test_group_statistics_are_float64_and_the_dtype_is_kept() -> None:
    rewards = torch.tensor([1e6 + 1, 1e6, 1e6 + 2, 1e6 + 1], dtype=torch.float32)
    got = group_advantage(rewards)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), group_advantage(rewards.double()), rtol=1e-7, atol=1e-7)
    assert group_advantage(torch.tensor([1, 0])).dtype == torch.float64


def test_eps_is_an_option() -> None:
    assert group_advantage(torch.tensor([0.0, 2.0], dtype=torch.float64), std="biased", eps=1.0).tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(("rewards", "words"), [
    (torch.tensor([1.0]), "G >= 2"), (torch.tensor([]), "G >= 2"), (torch.tensor(1.0), "G >= 2"), (torch.zeros(2, 2), "G >= 2"),
    (torch.tensor([1.0, math.nan]), "finite"), (torch.tensor([1.0, math.inf]), "finite"), (torch.tensor([math.nan] * 2), "finite"),
])
def test_group_advantage_refuses(rewards: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        group_advantage(rewards)


def test_group_advantage_refuses_an_unknown_deviation() -> None:
    with pytest.raises(ValueError, match="'unbiased' or 'biased'"):
        group_advantage(torch.tensor([0.0, 1.0]), std="sample")


# ------------------------------------------------------------------ the token

def hand_phi(u: float) -> float:
    return 0.5 * (max(u, 0.0) + math.log1p(math.exp(-abs(u))) - math.log(2.0))


FORMULAS = {
    ("grpo", "additive"): lambda a, s, t: a,
    ("sd", "additive"): lambda a, s, t: a + LAMBDA * (t - s),
    ("antisd", "additive"): lambda a, s, t: a - LAMBDA * hand_phi(t - s),
    ("reverse_kl", "additive"): lambda a, s, t: a - LAMBDA * (t - s),
    ("antisd", "multiplicative"): lambda a, s, t: a - LAMBDA * abs(a) * hand_phi(t - s),
    ("no_teacher", "additive"): lambda a, s, t: a - LAMBDA * hand_phi(-s),
}
NEEDS_TEACHER = ["sd", "antisd", "reverse_kl"]


def random_tokens(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a_seq, student, teacher = torch.randn(3, count, generator=generator, dtype=torch.float64)
    return a_seq, -8 * student.abs(), -8 * teacher.abs()


@pytest.mark.parametrize(("method", "compose"), FORMULAS)
@pytest.mark.parametrize("seed", range(10))
def test_every_variant_against_its_formula(method: str, compose: str, seed: int) -> None:
    a_seq, student, teacher = random_tokens(seed)
    got = token_advantage(a_seq, student, teacher, None, method=method, lambda_=LAMBDA, compose=compose)
    expected = [FORMULAS[method, compose](a, s, t) for a, s, t in zip(a_seq.tolist(), student.tolist(), teacher.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_antisd_by_hand_and_at_its_bound() -> None:
    a_seq = torch.zeros(3, dtype=torch.float64)
    student = torch.tensor([-1.0, -0.1, -9.0], dtype=torch.float64)
    teacher = torch.tensor([-1.0, -60.0, -0.5], dtype=torch.float64)  # nothing, deliberation, shortcut
    got = token_advantage(a_seq, student, teacher, None, method="antisd", lambda_=0.5).tolist()
    assert got[0] == 0.0
    assert got[1] == pytest.approx(0.17328679513998632, abs=1e-15)
    assert got[2] == pytest.approx(-0.25 * (math.log(1 + math.exp(8.5)) - math.log(2)), abs=1e-14)


def test_multiplicative_leaves_a_group_without_variance_alone() -> None:
    _, student, teacher = random_tokens(0)
    zero = torch.zeros_like(student)
    assert token_advantage(zero, student, teacher, None, method="antisd", lambda_=0.5, compose="multiplicative").tolist() == zero.tolist()
    assert token_advantage(zero, student, teacher, None, method="antisd", lambda_=0.5).abs().min() > 0


@pytest.mark.parametrize("method", ["grpo", "sd", "antisd", "reverse_kl", "no_teacher"])
@pytest.mark.parametrize("missing", [None, "nan"])
def test_lambda_zero_is_bitwise_grpo(method: str, missing: str | None) -> None:
    a_seq = torch.tensor([0.1, -0.0, 1e-40, 3.7, -2.1], dtype=torch.float32)
    student = torch.full((5,), -1.0)
    teacher = None if missing is None else torch.full((5,), math.nan)  # the term is skipped, not multiplied by 0
    got = token_advantage(a_seq, student, teacher, None, method=method, lambda_=0.0)
    assert torch.equal(got.view(torch.int32), a_seq.view(torch.int32))
    grpo = token_advantage(a_seq, student, None, None, method="grpo", lambda_=0.5)
    assert torch.equal(got.view(torch.int32), grpo.view(torch.int32))


@pytest.mark.parametrize("method", NEEDS_TEACHER)
@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf, 0.0])
def test_masked_tokens_get_the_sequence_advantage_alone(method: str, hole: float) -> None:
    a_seq, student, teacher = random_tokens(1)
    mask = torch.arange(40) % 3 != 0
    full = token_advantage(a_seq, student, teacher, None, method=method, lambda_=LAMBDA)
    got = token_advantage(a_seq, student, torch.where(mask, teacher, hole), mask, method=method, lambda_=LAMBDA)
    assert torch.equal(got[~mask], a_seq[~mask])
    assert torch.equal(got[mask], full[mask])


def test_masked_holes_do_not_leak_into_the_gradient() -> None:
    _, student, teacher = random_tokens(2)
    student.requires_grad_()
    mask = torch.arange(40) < 20
    teacher = torch.where(mask, teacher, math.nan)
    a = token_advantage(torch.ones_like(teacher), student, teacher, mask, method="antisd", lambda_=LAMBDA)
    assert not a.requires_grad
    (a * student).sum().backward()
    assert torch.equal(student.grad, a)


@pytest.mark.parametrize(("method", "compose"), FORMULAS)
def test_the_advantage_is_a_constant(method: str, compose: str) -> None:
    inputs = [t.requires_grad_() for t in random_tokens(4)]
    assert not token_advantage(*inputs, None, method=method, lambda_=LAMBDA, compose=compose).requires_grad
    assert not token_advantage(*inputs, None, method=method, lambda_=0.0, compose=compose).requires_grad


@pytest.mark.parametrize("method", NEEDS_TEACHER)
@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
def test_a_missing_teacher_score_raises(method: str, hole: float) -> None:
    a_seq, student, teacher = random_tokens(3)
    teacher[7] = hole
    for mask in (None, torch.ones(40, dtype=torch.bool)):
        with pytest.raises(ValueError, match="not finite at 1 of 40 tokens of teacher_mask, first at 7"):
            token_advantage(a_seq, student, teacher, mask, method=method, lambda_=LAMBDA)
    with pytest.raises(ValueError, match="needs a teacher"):
        token_advantage(a_seq, student, None, None, method=method, lambda_=LAMBDA)


def test_a_student_nan_propagates_and_never_becomes_a_number() -> None:
    a_seq, student, teacher = random_tokens(5)
    student[3] = math.nan
    for method in ("antisd", "no_teacher"):
        got = token_advantage(a_seq, student, teacher, None, method=method, lambda_=LAMBDA)
        assert got.isnan().nonzero().flatten().tolist() == [3]


def test_no_teacher_reads_neither_teacher_nor_mask() -> None:
    a_seq, student, teacher = random_tokens(6)
    alone = token_advantage(a_seq, student, None, None, method="no_teacher", lambda_=LAMBDA)
    nothing = torch.zeros(40, dtype=torch.bool)
    assert torch.equal(alone, token_advantage(a_seq, student, teacher * math.nan, nothing, method="no_teacher", lambda_=LAMBDA))


def test_no_tokens_at_all() -> None:
    empty = torch.zeros(0)
    assert token_advantage(empty, empty, empty, empty.bool(), method="antisd", lambda_=0.5).shape == (0,)


@pytest.mark.parametrize(("change", "words"), [
    ({"method": "dpo"}, "method 'dpo'"), ({"compose": "mixed"}, "compose 'mixed'"),
    ({"method": "sd", "compose": "multiplicative"}, "'antisd' only"),
    ({"lambda_": -0.1}, "finite number >= 0"), ({"lambda_": math.nan}, "finite number >= 0"), ({"lambda_": math.inf}, "finite number >= 0"),
    ({"student_log_prob": torch.zeros(4)}, r"student_log_prob has shape \(4,\), expected \(5,\)"),
    ({"teacher_log_prob": torch.zeros(1)}, "teacher_log_prob has shape"),
    ({"teacher_mask": torch.ones(4).bool()}, "teacher_mask has shape"),
    ({"teacher_mask": torch.ones(5)}, "expected torch.bool"), ({"sequence_advantage": torch.zeros(5, 1)}, "one entry per response token"),
])
def test_bad_input_is_refused_even_at_lambda_zero(change: dict, words: str) -> None:
    for lambda_ in (0.0, 0.5):
        given = {"sequence_advantage": torch.zeros(5), "student_log_prob": torch.zeros(5), "teacher_log_prob": torch.zeros(5),
                 "teacher_mask": torch.ones(5).bool(), "method": "antisd", "lambda_": lambda_} | change
        with pytest.raises(ValueError, match=words):
            token_advantage(**given)


@pytest.mark.parametrize(("length", "added"), [(1, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (16, -1.0)])
def test_the_overlong_penalty_grows_over_the_buffer(length: int, added: float) -> None:
    """DAPO's soft punishment: limit 16, buffer 4."""
    assert soft_overlong_penalty(length, limit=16, buffer=4, penalty=1.0) == added
    assert soft_overlong_penalty(length, limit=16, buffer=4, penalty=3.0) == 3 * added


@pytest.mark.parametrize(("length", "buffer"), [(17, 4), (0, 4), (3, 17), (3, 0)])
def test_the_overlong_penalty_refuses(length: int, buffer: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= buffer <= limit and 1 <= length <= limit"):
        soft_overlong_penalty(length, limit=16, buffer=buffer, penalty=1.0)
