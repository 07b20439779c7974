"""The sizes in a config.json, whichever of its spellings it uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    layers: int
    hidden: int
    heads: int
    groups: int
    """Key/value heads."""
    head_dim: int
    vocab: int
    feed_forward: int
    """Width of a dense MLP."""
    experts: int | None
    expert_feed_forward: int | None

    @staticmethod
    def of(hf: dict[str, Any]) -> Sizes:
        heads = hf["num_attention_heads"]
        return Sizes(
            layers=hf["num_hidden_layers"], hidden=hf["hidden_size"], heads=heads, groups=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads, vocab=hf["vocab_size"], feed_forward=hf["intermediate_size"],
            # transformers 5 writes num_local_experts, earlier releases num_experts
            experts=hf.get("num_experts") or hf.get("num_local_experts"), expert_feed_forward=hf.get("moe_intermediate_size"))
