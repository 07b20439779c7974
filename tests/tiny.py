"""Tiny random Hugging Face checkpoints, made by transformers itself, views to score, and the groups of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_antisd.records import ScoringView

VOCAB = 61


class OneRank:
    """A process group of this process alone, as far as an attention layer asks."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Groups:
    tp = cp = OneRank()


def make_olmo3(directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """An OLMo-3 of 4 layers: three with a window of 8 tokens, one with YaRN."""
    from transformers import Olmo3Config, Olmo3ForCausalLM

    config: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        max_position_embeddings=512, initializer_range=0.15, sliding_window=8, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
                               "beta_slow": 1.0, "attention_factor": 1.2}})
    torch.manual_seed(seed)
    model = Olmo3ForCausalLM(Olmo3Config(**{**config, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory)
    return directory


def make_checkpoint(directory: Path, *, moe: bool, seed: int = 0, tied: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A Qwen3 or Qwen3-MoE of 4 layers with weights large enough that every part matters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = dict(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=96, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.15,
        # No padding id: transformers would zero its embedding and leave it out of the gradient.
        bos_token_id=1, eos_token_id=2, pad_token_id=None)
    sparse: dict[str, Any] = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[])
    torch.manual_seed(seed)
    if moe:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**common, **sparse, **changes}))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**{**common, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(directory)
    return directory


def make_views(count: int = 8, seed: int = 0, vocab: int = VOCAB) -> tuple[ScoringView, ...]:
    """Views of uneven prompt and response lengths; the first three prompts begin alike, the next two are the same."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())

    trunk, prompt = ids(12, 20), ids(5, 20)
    prompts = [*(trunk + ids(1, 5) for _ in range(3)), prompt, prompt, *(ids(1, 20) for _ in range(count))]
    return tuple(ScoringView(prompt_ids=prompts[i], response_ids=ids(1, 30)) for i in range(count))


def gradient_on_disk(gradients: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """The gradient of a checkpoint's tensor: transformers holds a layer's experts fused in memory, [E, 2F, H] and [E, H, F]."""
    if ".experts." not in name:
        return gradients[name]
    prefix, _, rest = name.partition(".experts.")
    expert, projection, _ = rest.split(".")
    if projection == "down_proj":
        return gradients[f"{prefix}.experts.down_proj"][int(expert)]
    gate, up = gradients[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if projection == "gate_proj" else up
