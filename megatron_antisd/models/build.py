"""Hugging Face config -> Megatron TransformerConfig, layer spec and model chunks of this rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_antisd.config import ModelConfig, ParallelConfig
from megatron_antisd.models import transformer_engine
from megatron_antisd.models.attention import PackedAttention, PackedRotary
from megatron_antisd.models.description import FAMILIES, ModelDescription, describe
from megatron_antisd.models.experts import Experts
from megatron_antisd.models.norm import TorchRMSNorm
from megatron_antisd.models.rotary import frequencies
from megatron_antisd.models.routing import RoutedLayer

__all__ = ["FAMILIES", "ModelDescription", "PolicyModel", "build_model", "describe", "local_layer_spec", "transformer_config"]


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns final hidden states [T(/tp), 1, H]: the output layer is fused with scoring
    (`parallel.vocab`), so the model itself never makes logits."""

    layer_spec: str = "local"
    """`model.spec`, which decides the parameters' names."""

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    def output_weight(self) -> torch.Tensor:
        """[V_padded/tp, H]; the embedding where the two are tied."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def transformer_config(description: ModelDescription, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """The TransformerConfig of this model, dtype and layout."""
    hf, sizes = description.hf, description.sizes
    dtype = getattr(torch, model.dtype)
    on_gpu = torch.cuda.is_available()
    pipelined = parallel.pipeline_parallel_size > 1
    return TransformerConfig(
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.heads,
        num_query_groups=sizes.groups,
        kv_channels=sizes.head_dim,
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
        **(_pipeline_fields(parallel, description.layers) if pipelined else {}),
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        # Packed rows differ in length; stages announce shapes to each other.
        variable_seq_lengths=pipelined,
        # The only dispatcher that takes rows of varying length (Megatron asks for it even where there are no experts).
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=model.spec == "te",
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
        **_recompute_fields(model, moe=description.experts is not None),
    )


def _recompute_fields(model: ModelConfig, *, moe: bool) -> dict[str, Any]:
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        theirs = {"attention": "core_attn", "mlp": "moe" if moe else "mlp", "norms": "layernorm"}
        return {"recompute_granularity": "selective", "recompute_modules": [theirs[part] for part in model.recompute_modules or ("attention",)]}
    return {}


def _pipeline_fields(parallel: ParallelConfig, layers: int) -> dict[str, Any]:
    chunks = [["decoder"] * count for count in parallel.chunk_layers(layers)]
    chunks[0] = ["embedding", *chunks[0]]
    chunks[-1] = [*chunks[-1], "loss"]
    virtual = parallel.virtual_pipeline_size > 1
    return {
        "pipeline_model_parallel_layout": chunks,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_size if virtual else None,
        # With two stages both neighbours are one rank, and interleaved chunks with batched messages mix up a backward send with a forward
        # receive: wrong gradients, silently. Overlapped messages are right.
        "overlap_p2p_comm": virtual,
        "batch_p2p_comm": not virtual,
    }


def local_layer_spec(experts: int | None, expert_form: str = "auto") -> ModuleSpec:
    """Megatron's torch-only layer with our norm, our packed attention and our experts in the form `model.grouped_experts`."""
    spec = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm")
    layer = spec.submodules
    if experts:
        layer.mlp.submodules.experts.module = Experts
        layer.mlp.submodules.experts.params = {"form": expert_form}
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchRMSNorm
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    attention.core_attention = PackedAttention
    return spec


def build_model(description: ModelDescription, model: ModelConfig, parallel: ParallelConfig) -> list[PolicyModel]:
    """The chunks of this rank (one; several with virtual pipeline stages), randomly initialised. Groups must exist."""
    config = transformer_config(description, model, parallel)
    if model.spec == "local":
        spec = local_layer_spec(description.experts, model.grouped_experts)
    else:
        spec = transformer_engine.layer_spec(description.experts)
    specialise = getattr(FAMILIES[description.hf["model_type"]], "specialise", None)
    if specialise is not None:
        specialise(spec, model.spec)
    if description.experts:
        spec.module = RoutedLayer
    chunks = [_build_chunk(description, config, spec, stage) for stage in range(parallel.virtual_pipeline_size)]
    for chunk in chunks:
        chunk.layer_spec = model.spec
    return chunks


def _build_chunk(description: ModelDescription, config: TransformerConfig, spec: ModuleSpec, stage: int) -> PolicyModel:
    virtual = config.virtual_pipeline_model_parallel_size is not None
    vp_stage = stage if virtual else None
    block = TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=TorchRMSNorm)
    chunk = PolicyModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=description.geometry.padded_vocab_size,
        max_sequence_length=description.hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not virtual, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not virtual, vp_stage=vp_stage),
        share_embeddings_and_output_weights=description.tied,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    chunk.rotary_pos_emb = PackedRotary(frequencies(description.hf), config.params_dtype)
    _mark_expert_parameters(chunk)
    _let_router_graphs_go(chunk)
    return chunk.cuda() if torch.cuda.is_available() else chunk


def _mark_expert_parameters(model: torch.nn.Module) -> None:
    """Megatron marks experts as expert-parallel only when EP > 1. With EP 1 and ETP < TP their gradients would then never be
    reduced over the tensor-parallel ranks that hold copies, and experts would drift apart silently."""
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def _let_router_graphs_go(model: torch.nn.Module) -> None:
    """Megatron's dispatcher keeps the router's weights until the layer's next forward pass, for their dtype alone, and with them the graph they
    come from. Under recomputation that graph ends at a copy of the layer's input, with its gradient: two inputs a layer, from the backward pass
    through the rollouts to the next step."""
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            # The experts are called once the weights have been dispatched, when the whole layer is recomputed too.
            layer.experts.register_forward_hook(partial(_detach_dispatched, layer.token_dispatcher))


def _detach_dispatched(dispatcher: Any, *_: Any) -> None:
    dispatcher.probs = dispatcher.probs.detach()
