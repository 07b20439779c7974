"""RMSNorm on torch under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism: its weight is marked so that Megatron reduces its gradient over
    tensor-parallel ranks (`WrappedTorchNorm` refuses sequence parallelism instead)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
