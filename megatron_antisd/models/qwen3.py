"""Qwen3 and Qwen3-MoE: config fields and weight table. A family is these two functions."""

from __future__ import annotations

from typing import Any

from megatron_antisd.models.sizes import Sizes
from megatron_antisd.models.weight_map import Layout, Weight, gated_mlp


def fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields of a Qwen3 / Qwen3-MoE `config.json`; `config.rules` has refused what is not built here."""
    common = {
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "ffn_hidden_size": hf["intermediate_size"],
    }
    if hf["model_type"] == "qwen3":
        return common
    return common | {
        "num_moe_experts": hf.get("num_experts") or hf["num_local_experts"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_score_function": "softmax",
        # softmax over the chosen experts only: what norm_topk_prob=true amounts to
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        # The HF configs carry an auxiliary loss; RL leaves it out: it is not linear over micro-batches.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def weights(hf: dict[str, Any]) -> tuple[Weight, ...]:
    """The family's weight table."""
    n = Sizes.of(hf)
    norm, query, key = (n.hidden,), (n.heads * n.head_dim, n.hidden), (n.groups * n.head_dim, n.hidden)
    layer, here = "model.layers.{layer}.", "decoder.layers.{layer}."
    attention, ours = layer + "self_attn.", here + "self_attention."
    rows = [
        Weight(megatron="embedding.word_embeddings.weight", huggingface={"model.embed_tokens.weight": (n.vocab, n.hidden)}, layout=Layout.VOCAB),
        Weight(megatron=here + "input_layernorm.weight", huggingface={layer + "input_layernorm.weight": norm}, layout=Layout.REPLICATED),
        Weight(megatron=ours + "linear_qkv.weight", layout=Layout.QKV,
               huggingface={attention + "q_proj.weight": query, attention + "k_proj.weight": key, attention + "v_proj.weight": key}),
        Weight(megatron=ours + "q_layernorm.weight", huggingface={attention + "q_norm.weight": (n.head_dim,)}, layout=Layout.REPLICATED),
        Weight(megatron=ours + "k_layernorm.weight", huggingface={attention + "k_norm.weight": (n.head_dim,)}, layout=Layout.REPLICATED),
        Weight(megatron=ours + "linear_proj.weight", huggingface={attention + "o_proj.weight": query[::-1]}, layout=Layout.ROW),
        Weight(megatron=here + "pre_mlp_layernorm.weight", huggingface={layer + "post_attention_layernorm.weight": norm},
               layout=Layout.REPLICATED),
    ]
    if hf["model_type"] == "qwen3_moe":
        rows.append(Weight(megatron=here + "mlp.router.weight", huggingface={layer + "mlp.gate.weight": (n.experts, n.hidden)},
                           layout=Layout.REPLICATED))
        rows += gated_mlp(here + "mlp.experts.local_experts.{expert}.", layer + "mlp.experts.{expert}.", n.expert_feed_forward, n.hidden, expert=True)
    else:
        rows += gated_mlp(here + "mlp.", layer + "mlp.", n.feed_forward, n.hidden)
    rows.append(Weight(megatron="decoder.final_layernorm.weight", huggingface={"model.norm.weight": norm}, layout=Layout.REPLICATED))
    if not hf.get("tie_word_embeddings", False):
        rows.append(Weight(megatron="output_layer.weight", huggingface={"lm_head.weight": (n.vocab, n.hidden)}, layout=Layout.VOCAB))
    return tuple(rows)
