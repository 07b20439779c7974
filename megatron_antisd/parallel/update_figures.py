"""Figures of an update beyond loss and gradient, from what every rank holds alike: the correction's weights, the noise floor of u."""

from __future__ import annotations

import torch

from megatron_antisd.algorithm import importance_weights
from megatron_antisd.config import RunConfig
from megatron_antisd.records import TrainingBatch

LARGE_U = 0.1
"""Nats. phi's slope is at most 1/2: a token of this u moves the advantage by lambda / 2 of it at most."""


def correction(config: RunConfig, batch: TrainingBatch, log_ratio: torch.Tensor, token_weights: torch.Tensor) -> dict[str, float]:
    """The importance weights as applied, over tokens in the loss; nothing where the correction is off or no weight is finite.

    `log_ratio` [T]: trainer - engine log-prob of each token. `token_weights` [T]: 0 outside of the loss."""
    if config.correction_mode == "off":
        return {}
    own = log_ratio if batch.correction_log_ratio is None else batch.correction_log_ratio
    formed = importance_weights(own[token_weights != 0], mode=config.correction_mode, lower=config.correction.lower, upper=config.correction.upper)
    weight = formed.weight.double()
    if not weight.isfinite().all():
        return {}  # the update is skipped, and has no figures
    return {"correction_weight_mean": float(weight.mean()), "correction_weight_max": float(weight.max()),
            "correction_weight_min": float(weight.min()), "correction_touched_share": float(formed.touched.double().mean())}


def noise_floor(batch: TrainingBatch, log_prob: torch.Tensor) -> dict[str, float]:
    """|u| of the first tokens between the teacher's path on an empty context and the training forward's `log_prob` [T]; nothing where it is not
    measured, or not finite."""
    if batch.empty_context_log_prob is None:
        return {}
    return u_size(batch.empty_context_log_prob, log_prob[: len(batch.empty_context_log_prob)])


def u_size(teacher: torch.Tensor, student: torch.Tensor) -> dict[str, float]:
    """Mean and largest |teacher - student| of two log-probs [n], and the share above `LARGE_U`; nothing where one is not finite."""
    u = (teacher.double() - student.double()).abs()
    if not u.isfinite().all():
        return {}
    return {"noise_floor_mean": float(u.mean()), "noise_floor_max": float(u.max()), "noise_floor_share": float((u > LARGE_U).double().mean())}
