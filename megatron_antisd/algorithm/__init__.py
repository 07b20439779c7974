"""The algorithm in pure torch: no process groups, no Megatron, no vLLM. `advantage.py` is the place to start reading."""

from megatron_antisd.algorithm.advantage import Compose, Method, group_advantage, phi, token_advantage
from megatron_antisd.algorithm.gate import LAYOUT_ROUNDING, EntropyGate, GateDecision, GateMode, WarmStatistic, lower_median
from megatron_antisd.algorithm.loss import LossMode, SurrogateLoss, clipped_surrogate, token_weights

__all__ = [
    "LAYOUT_ROUNDING", "Compose", "EntropyGate", "GateDecision", "GateMode", "LossMode", "Method", "SurrogateLoss", "WarmStatistic",
    "clipped_surrogate", "group_advantage", "lower_median", "phi", "token_advantage", "token_weights",
]
