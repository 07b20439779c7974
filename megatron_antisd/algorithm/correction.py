"""Importance weights against the mismatch of trainer and engine, as constants.

A response is drawn by the engine, whose distribution mu is not quite the trainer's pi: other kernels, another rounding, older weights. The policy
gradient of pi over draws of mu is E_mu[pi / mu * A grad log pi]. Weights w = pi / mu bring it back, and bounds keep their variance in check, at the
price of the bias that lies outside of them.

    truncate   min(w, upper)                      Espeholt et al. 2018 (V-trace), Yao et al. 2025 for LLM engines
    mask       w inside [lower, upper], else 0    what is far off the trainer's policy teaches nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

CorrectionMode = Literal["truncate", "mask"]


class ImportanceWeights(NamedTuple):
    """Both [T], one entry per response token, no gradient."""

    weight: Tensor
    touched: Tensor
    """bool: the bounds changed it."""


def importance_weights(log_ratio: Tensor, *, mode: CorrectionMode, lower: float, upper: float) -> ImportanceWeights:
    """Weights of tokens with `log_ratio` [T] = log pi(y_t) - log mu(y_t), nats, of the token or of what it belongs to (`sequence_log_ratio`).

    `lower` takes part in 'mask' only. A NaN stays one in either mode, so that a broken log-prob cannot pass for a masked token. Raises ValueError
    for another mode or bounds that do not enclose 1.
    """
    if mode not in ("truncate", "mask"):
        raise ValueError(f"correction mode is {mode!r}, expected 'truncate' or 'mask'; where it is off no weights are formed")
    if not 0.0 <= lower < 1.0 < upper:
        raise ValueError(f"the bounds are {lower} and {upper}, expected 0 <= lower < 1 < upper: a weight of 1 is no mismatch")
    ratio = log_ratio.detach().exp()
    if mode == "truncate":
        return ImportanceWeights(ratio.clamp(max=upper), ratio > upper)
    outside = (ratio < lower) | (ratio > upper)
    return ImportanceWeights(torch.where(outside, 0.0, ratio), outside)


def sequence_log_ratio(log_ratio: Tensor, lengths: Sequence[int]) -> Tensor:
    """[T] of each token -> [T] of its whole response, the sum over the response's tokens, summed in float64. `lengths`: of the responses."""
    if log_ratio.shape != (sum(lengths),):
        raise ValueError(f"log_ratio has shape {tuple(log_ratio.shape)}, expected ({sum(lengths)},) from {len(lengths)} responses")
    sums = torch.stack([part.double().sum() for part in log_ratio.detach().split(list(lengths))])
    return sums.repeat_interleave(torch.tensor(lengths, device=log_ratio.device)).to(log_ratio.dtype)
