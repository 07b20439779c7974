"""Hugging Face config -> Megatron TransformerConfig, layer spec and model chunks of this rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_antisd.config import ConfigError, ModelConfig, ParallelConfig
from megatron_antisd.models import olmo3, qwen3
from megatron_antisd.models.attention import PackedAttention, PackedRotary
from megatron_antisd.models.experts import Experts
from megatron_antisd.models.norm import TorchRMSNorm
from megatron_antisd.models.rotary import frequencies, rope_parameters
from megatron_antisd.models.weight_map import Geometry, Weight

FAMILIES: dict[str, ModuleType] = {"qwen3": qwen3, "qwen3_moe": qwen3, "olmo3": olmo3}
"""model_type -> the page with its `fields`, `weights` and, where the layer is not Qwen3's, `specialise`."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a checkpoint directory says of its model, without weights."""

    hf: dict[str, Any]
    """The parsed config.json."""
    weights: tuple[Weight, ...]
    geometry: Geometry
    layers: int
    experts: int | None
    tied: bool
    rope: dict[str, dict[str, Any]]
    """Kind of layer -> rotary parameters, as transformers names them."""


def describe(model_dir: str | Path, tensor_parallel_size: int) -> ModelDescription:
    """Read `config.json`. Raises ConfigError when the family is not supported."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path: no config.json in {model_dir}; expected a Hugging Face checkpoint directory")
    hf = json.loads(path.read_text())
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None:
        raise ConfigError(f"model.path: model_type {hf.get('model_type')!r} is not supported; supported are {sorted(FAMILIES)}")
    vocab = hf["vocab_size"]
    return ModelDescription(
        hf=hf,
        weights=family.weights(hf),
        geometry=Geometry(groups=key_value_heads(hf), head_dim=head_dim(hf), vocab_size=vocab,
                          padded_vocab_size=vocab + -vocab % tensor_parallel_size),
        layers=hf["num_hidden_layers"],
        experts=hf.get("num_experts") or hf.get("num_local_experts"),
        tied=bool(hf.get("tie_word_embeddings", False)),
        rope=rope_parameters(hf),
    )


def head_dim(hf: dict[str, Any]) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def key_value_heads(hf: dict[str, Any]) -> int:
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns final hidden states [T(/tp), 1, H]: the output layer is fused with scoring
    (`parallel.vocab`), so the model itself never makes logits."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """[V_padded/tp, H]; the embedding where the two are tied."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def transformer_config(description: ModelDescription, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The TransformerConfig of this model, dtype and layout."""
    hf = description.hf
    dtype = getattr(torch, model.dtype)
    on_gpu = torch.cuda.is_available()
    pipelined = parallel.pipeline_parallel_size > 1
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if model.recompute == "full" else {}
    return TransformerConfig(
        num_layers=description.layers,
        hidden_size=hf["hidden_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=key_value_heads(hf),
        kv_channels=head_dim(hf),
        normalization="RMSNorm",
        layernorm_epsilon=hf["rms_norm_eps"],
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=hf.get("initializer_range", 0.02),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not on_gpu,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        sequence_parallel=parallel.tensor_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        # Packed rows differ in length; stages announce shapes to each other.
        variable_seq_lengths=pipelined,
        batch_p2p_comm=True,
        # The only dispatcher that takes rows of varying length (Megatron asks for it even where there are no experts).
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=False,
        # The loss arrives divided by a global token count: Megatron must neither average over micro-batches nor over ranks.
        calculate_per_token_loss=True,
        attention_softmax_in_fp32=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **FAMILIES[hf["model_type"]].fields(hf),
        **recompute,
    )


def local_layer_spec(experts: int | None) -> ModuleSpec:
    """Megatron's torch-only layer with our norm and our packed attention."""
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm")
    layer = spec.submodules
    if experts:
        layer.mlp.submodules.experts.module = Experts
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchRMSNorm
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    attention.core_attention = PackedAttention
    return spec


def build_model(description: ModelDescription, model: ModelConfig, parallel: ParallelConfig) -> list[PolicyModel]:
    """The chunks of this rank (one; several with virtual pipeline stages), randomly initialised. Groups must exist."""
    if model.spec == "te":
        raise ConfigError("model.spec=te: transformer-engine layers are not built by this version; use model.spec=local")
    config = transformer_config(description, model, parallel)
    spec = local_layer_spec(description.experts)
    specialise = getattr(FAMILIES[description.hf["model_type"]], "specialise", None)
    if specialise is not None:
        specialise(spec)
    block = TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=TorchRMSNorm)
    chunk = PolicyModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=description.geometry.padded_vocab_size,
        max_sequence_length=description.hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=description.tied,
        position_embedding_type="rope",
    )
    chunk.rotary_pos_emb = PackedRotary(frequencies(description.hf), config.params_dtype)
    _mark_expert_parameters(chunk)
    return [chunk if torch.cuda.is_available() is False else chunk.cuda()]


def _mark_expert_parameters(model: torch.nn.Module) -> None:
    """Megatron marks experts as expert-parallel only when EP > 1. With EP 1 and ETP < TP their gradients would then never be
    reduced over the tensor-parallel ranks that hold copies, and experts would drift apart silently."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False
