"""Transformer-engine's layers, where it is installed: their spec, and what they call the parameters of the weight tables.

It joins a norm to the linear layer behind it and holds the experts of a rank in one module. Core attention stays ours: its thd attention knows
nothing of sequences that continue another one. The names are Megatron-Core 0.16.1's; no machine with transformer-engine was at hand to run it.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_antisd.models.attention import PackedAttention

_JOINED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_GROUPED_EXPERTS = {
    ".experts.local_experts.{expert}.linear_fc1.weight": ".experts.linear_fc1.weight{expert}",
    ".experts.local_experts.{expert}.linear_fc2.weight": ".experts.linear_fc2.weight{expert}",
}


def parameter_name(megatron: str, *, moe: bool) -> str:
    """A weight table's Megatron name, `{layer}` and `{expert}` unfilled, as transformer-engine's layers spell it."""
    names = _JOINED_NORMS | _GROUPED_EXPERTS
    if moe:  # the norm before a router stands alone
        del names[".pre_mlp_layernorm.weight"]
    for ours, theirs in names.items():
        if megatron.endswith(ours):
            return megatron.removesuffix(ours) + theirs
    return megatron


def layer_spec(experts: int | None) -> ModuleSpec:
    """Megatron's transformer-engine layer with our packed attention. Needs the package."""
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=experts, moe_grouped_gemm=bool(experts), qk_layernorm=True)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec
