"""OLMo-3: norms behind attention and MLP instead of before them, query and key norms over the whole projection, sliding windows on three layers of
four, each kind of layer with rotary frequencies of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from megatron.core import parallel_state
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_antisd.models.norm import TorchRMSNorm
from megatron_antisd.models.rotary import SLIDING
from megatron_antisd.models.sizes import Sizes
from megatron_antisd.models.weight_map import Layout, Weight, gated_mlp


def fields(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields of an OLMo-3 `config.json`."""
    kinds = layer_types(hf)
    window: dict[str, Any] = {}
    if SLIDING in kinds:
        window = {"window_size": (hf["sliding_window"] - 1, 0), "window_attn_skip_freq": [int(kind == SLIDING) for kind in kinds]}
    return {
        # Megatron would sum the gradients of such norms over tensor-parallel ranks; these are sharded.
        "qk_layernorm": False,
        "add_qkv_bias": False,
        "ffn_hidden_size": hf["intermediate_size"],
        **window,
    }


def layer_types(hf: dict[str, Any]) -> list[str]:
    """The kind of attention of each layer; every fourth is full where the config does not say."""
    return hf.get("layer_types") or ["full_attention" if layer % 4 == 3 else SLIDING for layer in range(hf["num_hidden_layers"])]


def specialise(spec: ModuleSpec, kind: str) -> None:
    """Change Megatron's layer into OLMo-3's. `kind`: "local", or "te", whose norms before attention and MLP are part of the linear layers."""
    layer = spec.submodules
    if kind == "te":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = TEColumnParallelLinear
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    attention = layer.self_attention.submodules
    attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    attention.linear_proj = layer.mlp.submodules.linear_fc2 = NormedRowParallelLinear


def weights(hf: dict[str, Any]) -> tuple[Weight, ...]:
    """The family's weight table."""
    n = Sizes.of(hf)
    norm, query, key = (n.hidden,), (n.heads * n.head_dim, n.hidden), (n.groups * n.head_dim, n.hidden)
    layer, here = "model.layers.{layer}.", "decoder.layers.{layer}."
    attention, ours = layer + "self_attn.", here + "self_attention."
    rows = [
        Weight(megatron="embedding.word_embeddings.weight", huggingface={"model.embed_tokens.weight": (n.vocab, n.hidden)}, layout=Layout.VOCAB),
        Weight(megatron=ours + "linear_qkv.weight", layout=Layout.QKV,
               huggingface={attention + "q_proj.weight": query, attention + "k_proj.weight": key, attention + "v_proj.weight": key}),
        Weight(megatron=ours + "q_layernorm.weight", huggingface={attention + "q_norm.weight": query[:1]}, layout=Layout.COLUMN),
        Weight(megatron=ours + "k_layernorm.weight", huggingface={attention + "k_norm.weight": key[:1]}, layout=Layout.COLUMN),
        Weight(megatron=ours + "linear_proj.weight", huggingface={attention + "o_proj.weight": query[::-1]}, layout=Layout.ROW),
        Weight(megatron=ours + "linear_proj.norm.weight", huggingface={layer + "post_attention_layernorm.weight": norm}, layout=Layout.REPLICATED),
        *gated_mlp(here + "mlp.", layer + "mlp.", n.feed_forward, n.hidden),
        Weight(megatron=here + "mlp.linear_fc2.norm.weight", huggingface={layer + "post_feedforward_layernorm.weight": norm},
               layout=Layout.REPLICATED),
        Weight(megatron="decoder.final_layernorm.weight", huggingface={"model.norm.weight": norm}, layout=Layout.REPLICATED),
    ]
    if not hf.get("tie_word_embeddings", False):
        rows.append(Weight(megatron="output_layer.weight", huggingface={"lm_head.weight": (n.vocab, n.hidden)}, layout=Layout.VOCAB))
    return tuple(rows)


class NormedRowParallelLinear(RowParallelLinear):
    """The last projection of attention or MLP, and the norm behind it, which under sequence parallelism sees this rank's tokens."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.norm = TorchRMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, bias = super().forward(input_)
        return self.norm(out), bias


class _ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a projection [T, 1, heads/tp, d]: under tensor parallelism each rank has a part of the heads and of the
    weight, and the mean square is reduced over the ranks, forward and backward."""

    def __init__(self, config: TransformerConfig, heads: int, eps: float) -> None:
        super().__init__()
        self._group, self._eps = parallel_state.get_tensor_model_parallel_group(), eps
        self._width = heads * config.kv_channels
        self.weight = torch.nn.Parameter(torch.ones(self._width // dist.get_world_size(self._group), dtype=config.params_dtype))
        # Each rank's part counts in the global gradient norm.
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 0, 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        square = wide.square().sum(dim=(-2, -1), keepdim=True)
        if dist.get_world_size(self._group) > 1:
            square = differentiable.all_reduce(square, group=self._group)
        normed = wide * torch.rsqrt(square / self._width + self._eps)
        return (self.weight.view(x.shape[-2:]) * normed).to(x.dtype)


class QueryNorm(_ProjectionNorm):
    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(config, config.num_attention_heads, eps)


class KeyNorm(_ProjectionNorm):
    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(config, config.num_query_groups, eps)
