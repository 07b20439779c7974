"""Anti-Self-Distillation's advantage: Algorithm 1 of arXiv 2605.11609 and the variants it is compared with.

Per sampled token, with the student's log-prob s_t and the teacher's t_t (the same weights, shown privileged context c):

    u_t = t_t - s_t = PMI(y_t; c | x, y_<t)                      Eq. 4
    phi(u) = 1/2 (softplus(u) - log 2)                           Eq. 6
    A_i,t = A_seq_i - lambda * stopgrad(phi(u_i,t))              Algorithm 1, line 10

u_t >> 0 marks tokens that the shown solution implies (shortcuts), u_t << 0 marks deliberation. -phi is the ascent direction of
JSD(pi_S || pi_T) in policy-gradient form: at most +1/2 log 2 for deliberation, a linear penalty for shortcuts.

Deviations from the paper, and what it leaves open:
* Group statistics are float64, the deviation is unbiased (option: biased), eps = 1e-6 joins the denominator. Rewards that are all
  equal give A_seq of exactly 0, without rounding noise.
* lambda = 0 skips the term (no `0 * phi`), so such a step is bitwise plain GRPO.
* `multiplicative` is A_seq - lambda * |A_seq| * phi(u): the paper says only that the term shrinks with A_seq; this keeps its direction.
* `no_teacher` puts u := -s_t: the paper says only "a function of the student's log-probability alone".
* softplus is log(e^u + e^0): torch's softplus turns linear above 20, which is not monotone in float64.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["grpo", "sd", "antisd", "reverse_kl", "no_teacher"]
Compose = Literal["additive", "multiplicative"]


def phi(u: Tensor) -> Tensor:
    """Eq. 6, elementwise over any shape. phi(0) = 0, phi' = sigmoid / 2, strictly increasing, phi >= -1/2 log 2 (Lemma 5)."""
    return 0.5 * (torch.logaddexp(u, torch.zeros_like(u)) - math.log(2.0))


def soft_overlong_penalty(length: int, *, limit: int, buffer: int, penalty: float) -> float:
    """What is added to the reward of a response of `length` tokens (Yu et al. 2025, DAPO, Eq. 13, times `penalty`): 0 up to `limit - buffer`, from
    there linearly down to -`penalty` at `limit`, the longest response that can be. Raises ValueError for a length beyond it."""
    if not 1 <= buffer <= limit or not 0 < length <= limit:
        raise ValueError(f"got length {length}, limit {limit}, buffer {buffer}; expected 1 <= buffer <= limit and 1 <= length <= limit")
    return -penalty * max(0.0, (length - (limit - buffer)) / buffer)


def group_advantage(rewards: Tensor, *, std: Literal["unbiased", "biased"] = "unbiased", eps: float = 1e-6) -> Tensor:
    """A_seq of one group: rewards [G], G >= 2, -> (R - mean) / (std + eps) [G], exactly 0 where all rewards are equal.

    Statistics are float64; the result has the rewards' floating dtype (float64 for integer rewards). Raises ValueError.
    """
    if rewards.ndim != 1 or rewards.numel() < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}, expected [G] with G >= 2: a rollout alone has no group to "
                         "compare with; sample at least 2 per problem")
    if std not in ("unbiased", "biased"):
        raise ValueError(f"std is {std!r}, expected 'unbiased' or 'biased'")
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards are {rewards.tolist()}, expected finite numbers; check the grader")
    r = rewards.double()
    if (r == r[0]).all():
        a_seq = torch.zeros_like(r)
    else:
        a_seq = (r - r.mean()) / (r.std(unbiased=std == "unbiased") + eps)
    return a_seq.to(rewards.dtype) if rewards.is_floating_point() else a_seq


@torch.no_grad()
def token_advantage(
    sequence_advantage: Tensor, student_log_prob: Tensor, teacher_log_prob: Tensor | None, teacher_mask: Tensor | None,
    *, method: Method, lambda_: float, compose: Compose = "additive",
) -> Tensor:
    """A_i,t [T], detached. All tensors are [T], one entry per response token; log-probs in nats.

    `sequence_advantage` is A_seq of the token's rollout. `teacher_mask` (bool) is False where the rollout has no teacher: there the
    result is A_seq, whatever `teacher_log_prob` holds; None means every token has a teacher. `no_teacher` reads neither of the two.
    A teacher log-prob that is not finite under the mask raises ValueError; one of the student's propagates, so that the loss is not
    finite on any rank and the update is skipped everywhere. lambda_ = 0 returns `sequence_advantage` bitwise.
    """
    if method not in get_args(Method) or compose not in get_args(Compose):
        raise ValueError(f"got method {method!r}, compose {compose!r}; expected one of {get_args(Method)} and one of {get_args(Compose)}")
    if compose == "multiplicative" and method != "antisd":
        raise ValueError(f"compose 'multiplicative' is defined for method 'antisd' only, got {method!r}")
    if not 0.0 <= lambda_ < math.inf:
        raise ValueError(f"lambda_ is {lambda_}, expected a finite number >= 0")
    _check_shapes(sequence_advantage, student_log_prob=student_log_prob, teacher_log_prob=teacher_log_prob, teacher_mask=teacher_mask)
    a_seq = sequence_advantage.detach()
    if method == "grpo" or lambda_ == 0.0:
        return a_seq                                                                # skipped: bitwise GRPO
    if method == "no_teacher":
        return a_seq - lambda_ * phi(-student_log_prob)                             # u := -s_t
    u, mask = _pointwise_mutual_information(student_log_prob, teacher_log_prob, teacher_mask)
    if method == "sd":
        advantage = a_seq + lambda_ * u                                             # Lemma 1: descends KL(pi_S || pi_T)
    elif method == "reverse_kl":
        advantage = a_seq - lambda_ * u                                             # Lemma 1: ascends it
    elif compose == "multiplicative":
        advantage = a_seq - lambda_ * a_seq.abs() * phi(u)
    else:
        advantage = a_seq - lambda_ * phi(u)                                        # Algorithm 1, line 10
    return torch.where(mask, advantage, a_seq)


def _pointwise_mutual_information(student: Tensor, teacher: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """u_t = t_t - s_t (Eq. 4) and the mask, both [T]; raises where the teacher is missing."""
    if teacher is None:
        raise ValueError("teacher_log_prob is None while the method needs a teacher and lambda_ > 0; score the teacher's views first")
    mask = torch.ones_like(teacher, dtype=torch.bool) if mask is None else mask
    missing = mask & ~torch.isfinite(teacher)
    if missing.any():
        raise ValueError(f"teacher_log_prob is not finite at {int(missing.sum())} of {int(mask.sum())} tokens of teacher_mask, first at "
                         f"{int(missing.nonzero()[0])}; mask the tokens of rollouts without a teacher")
    return teacher - student, mask


def _check_shapes(sequence_advantage: Tensor, **others: Tensor | None) -> None:
    if sequence_advantage.ndim != 1:
        raise ValueError(f"sequence_advantage has shape {tuple(sequence_advantage.shape)}, expected [T], one entry per response token")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != sequence_advantage.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(sequence_advantage.shape)} as sequence_advantage")
    mask = others["teacher_mask"]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"teacher_mask has dtype {mask.dtype}, expected torch.bool")
