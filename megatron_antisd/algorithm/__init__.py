"""The algorithm in pure torch: no process groups, no Megatron, no vLLM. `advantage.py` is the place to start reading."""

from megatron_antisd.algorithm.advantage import Compose, Method, group_advantage, phi, soft_overlong_penalty, token_advantage
from megatron_antisd.algorithm.correction import CorrectionMode, ImportanceWeights, importance_weights, sequence_log_ratio
from megatron_antisd.algorithm.gate import LAYOUT_ROUNDING, EntropyGate, GateDecision, GateMode, WarmStatistic, lower_median
from megatron_antisd.algorithm.loss import LossMode, SurrogateLoss, clipped_surrogate, token_weights

__all__ = [
    "LAYOUT_ROUNDING", "Compose", "CorrectionMode", "EntropyGate", "GateDecision", "GateMode", "ImportanceWeights", "LossMode", "Method",
    "SurrogateLoss", "WarmStatistic", "clipped_surrogate", "group_advantage", "importance_weights", "lower_median", "phi", "sequence_log_ratio",
    "soft_overlong_penalty", "token_advantage", "token_weights",
]
