"""Tiny random Qwen3 checkpoints made by transformers, and their log-probs: the oracle of the engine's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB = 128
CONTEXT = 512


def make_model(family: str, seed: int, *, hidden: int = 64, layers: int = 2, context: int = CONTEXT) -> PreTrainedModel:
    """`dense` or `moe`, float32; weights wide enough that two seeds disagree by whole nats."""
    shape = dict(vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=32, intermediate_size=2 * hidden, max_position_embeddings=context, tie_word_embeddings=False,
                 initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=hidden, norm_topk_prob=True,
                   decoder_sparse_step=1, mlp_only_layers=[])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "moe":
            model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones would hide a norm that is not loaded
                parameter.data.uniform_(0.5, 1.5)
    return model.float().eval()


def save(model: PreTrainedModel, path: Path) -> dict[str, torch.Tensor]:
    """Write the checkpoint and return it as on disk (experts one by one): Hugging Face name -> full tensor."""
    from safetensors.torch import load_file

    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[len(response)] log softmax(logits / temperature) of each response token, by one plain forward pass."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
