"""Qwen3 and Qwen3-MoE: config fields and weight table. A family is these two functions."""

from __future__ import annotations

from typing import Any

from megatron_antisd.models.weight_map import Layout, Weight


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
    layer, here = "model.layers.{layer}.", "decoder.layers.{layer}."
    rows = [
        Weight(megatron="embedding.word_embeddings.weight", huggingface=("model.embed_tokens.weight",), layout=Layout.VOCAB),
        Weight(megatron=here + "input_layernorm.weight", huggingface=(layer + "input_layernorm.weight",), layout=Layout.REPLICATED),
        Weight(megatron=here + "self_attention.linear_qkv.weight",
               huggingface=tuple(layer + f"self_attn.{x}_proj.weight" for x in "qkv"), layout=Layout.QKV),
        Weight(megatron=here + "self_attention.q_layernorm.weight", huggingface=(layer + "self_attn.q_norm.weight",), layout=Layout.REPLICATED),
        Weight(megatron=here + "self_attention.k_layernorm.weight", huggingface=(layer + "self_attn.k_norm.weight",), layout=Layout.REPLICATED),
        Weight(megatron=here + "self_attention.linear_proj.weight", huggingface=(layer + "self_attn.o_proj.weight",), layout=Layout.ROW),
        Weight(megatron=here + "pre_mlp_layernorm.weight", huggingface=(layer + "post_attention_layernorm.weight",), layout=Layout.REPLICATED),
    ]
    if hf["model_type"] == "qwen3_moe":
        theirs, ours = layer + "mlp.experts.{expert}.", here + "mlp.experts.local_experts.{expert}."
        rows += [
            Weight(megatron=here + "mlp.router.weight", huggingface=(layer + "mlp.gate.weight",), layout=Layout.REPLICATED),
            Weight(megatron=ours + "linear_fc1.weight", huggingface=(theirs + "gate_proj.weight", theirs + "up_proj.weight"),
                   layout=Layout.GATED, expert=True),
            Weight(megatron=ours + "linear_fc2.weight", huggingface=(theirs + "down_proj.weight",), layout=Layout.ROW, expert=True),
        ]
    else:
        rows += [
            Weight(megatron=here + "mlp.linear_fc1.weight", huggingface=(layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"),
                   layout=Layout.GATED),
            Weight(megatron=here + "mlp.linear_fc2.weight", huggingface=(layer + "mlp.down_proj.weight",), layout=Layout.ROW),
        ]
    rows.append(Weight(megatron="decoder.final_layernorm.weight", huggingface=("model.norm.weight",), layout=Layout.REPLICATED))
    if not hf.get("tie_word_embeddings", False):
        rows.append(Weight(megatron="output_layer.weight", huggingface=("lm_head.weight",), layout=Layout.VOCAB))
    return tuple(rows)
