"""The clipped policy-gradient loss with a denominator that is given, not derived.

Every response token carries a weight that already holds the global denominator, so that the loss is a plain sum over tokens: the same
however the batch is split into micro-batches, ranks or layouts (sums of the parts add up, no mean of means).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossMode = Literal["token_mean", "sequence_mean"]


class SurrogateLoss(NamedTuple):
    """The policy loss of some tokens and how many of them were clipped."""

    loss: Tensor
    """Scalar with gradient: the sum of weight * token loss."""
    clipped_count: Tensor
    """Scalar int64, no gradient: tokens in the loss whose clipped branch was the smaller one."""


def token_weights(lengths: Sequence[int], sequence_mask: Tensor, mode: LossMode) -> Tensor:
    """Weights [T] float32 of the tokens of N responses, T = sum of `lengths`, for the whole global batch (slice it for a part).

    'token_mean': 1 / (tokens of all unmasked responses). 'sequence_mean': 1 / (tokens of this response * unmasked responses).
    `sequence_mask` [N] bool: False gives the response's tokens weight 0. Both counts are integers of the global batch. Raises ValueError
    when a length is below 1, the mask does not fit, or nothing is unmasked.
    """
    if mode not in ("token_mean", "sequence_mean"):
        raise ValueError(f"loss mode is {mode!r}, expected 'token_mean' or 'sequence_mean'")
    if sequence_mask.shape != (len(lengths),) or sequence_mask.dtype != torch.bool:
        raise ValueError(f"sequence_mask has shape {tuple(sequence_mask.shape)} and dtype {sequence_mask.dtype}, expected "
                         f"({len(lengths)},) of torch.bool, one entry per response")
    if any(length < 1 for length in lengths):
        raise ValueError(f"response lengths are {list(lengths)}, expected at least 1 token each")
    device = sequence_mask.device
    length = torch.tensor(lengths, dtype=torch.int64, device=device)
    sequences, tokens = int(sequence_mask.sum()), int(length[sequence_mask].sum())
    if sequences == 0:
        raise ValueError(f"none of the {len(lengths)} responses is in the loss, so there is nothing to average over; skip the update, or "
                         "keep groups whose rewards are all equal")
    per_token = torch.full_like(length, tokens) if mode == "token_mean" else length * sequences
    weight = torch.where(sequence_mask, 1.0 / per_token.double(), 0.0).float()
    return weight.repeat_interleave(length)


def clipped_surrogate(log_prob: Tensor, old_log_prob: Tensor | None, advantage: Tensor, weight: Tensor, clip: float) -> SurrogateLoss:
    """sum_t w_t * -min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t), with r_t = pi(y_t) / pi_old(y_t). All tensors [T]; T may be 0.

    `old_log_prob` None is on-policy: r_t = exp(log_prob - stopgrad(log_prob)) is exactly 1, nothing is clipped and the gradient is the
    plain policy gradient -w_t A_t grad log pi(y_t). The advantage and the old log-probs are constants. Tokens of weight 0 take no part,
    whatever they hold. Raises ValueError on shapes that differ or a clip outside (0, 1).
    """
    if not 0.0 < clip < 1.0:
        raise ValueError(f"clip is {clip}, expected a number between 0 and 1")
    for name, tensor in (("old_log_prob", old_log_prob), ("advantage", advantage), ("weight", weight)):
        if tensor is not None and (tensor.shape != log_prob.shape or log_prob.ndim != 1):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} and log_prob {tuple(log_prob.shape)}, expected [T] for both")
    taking_part = weight != 0
    old = log_prob.detach() if old_log_prob is None else old_log_prob.detach()
    # Neutral values enter before the exponential: a `where` behind it would still send 0 * nan through the backward pass.
    ratio = torch.where(taking_part, log_prob - old, 0.0).exp()
    a = torch.where(taking_part, advantage.detach(), 0.0)
    plain, clipped = ratio * a, ratio.clamp(1.0 - clip, 1.0 + clip) * a
    loss = -(weight * torch.minimum(plain, clipped)).sum()
    return SurrogateLoss(loss, (clipped < plain).detach().sum())
