"""A tiny Hugging Face checkpoint with random weights: Qwen3 or Qwen3-MoE, with its own word tokenizer or a given real one.

    python tools/make_tiny_checkpoint.py --output DIR                                       7.4M-parameter MoE, 512 words
    python tools/make_tiny_checkpoint.py --output DIR --tokenizer DIR [--chat-template FILE] --layers 2 --hidden 64

For benchmarks, and to try a configuration, data and layout before the real model is there. The own tokenizer's words are
`w0 w1 ...`; any of them in any order is a text. A given tokenizer's files are copied unchanged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja")
VOCABULARY_MULTIPLE = 64
"""The vocabulary of a given tokenizer is filled up to a multiple of this, so that it splits evenly over tensor-parallel ranks."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model. `experts=0` makes a dense Qwen3 whose MLP has width `intermediate`."""

    layers: int = 4
    hidden: int = 256
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 64
    experts: int = 8
    active_experts: int = 2
    intermediate: int = 256
    context: int = 512
    tied: bool = False
    initializer_range: float = 0.02


def make_tiny_checkpoint(output: str | Path, *, shape: Shape | None = None, vocab_size: int | None = None, tokenizer: str | Path | None = None,
                         chat_template: str | Path | None = None, seed: int = 0) -> Path:
    """Write config, safetensors (float32), tokenizer and generation_config.json to `output` and return it.

    `vocab_size` None: 512 with the own tokenizer, otherwise what the given one needs. Raises ValueError for a vocabulary that is too
    small, a tokenizer without end token or chat template, and an `output` that already holds files.
    """
    import torch

    output, shape = Path(output), shape or Shape()
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} exists and is not empty; name another directory, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    words = _copy_tokenizer(output, tokenizer, chat_template) if tokenizer else _own_tokenizer(output, vocab_size or 512, shape.context)
    needed = max(words.get_vocab().values()) + 1
    size = vocab_size or needed + -needed % VOCABULARY_MULTIPLE
    if size < needed:
        raise ValueError(f"vocab_size={size} is below the {needed} entries of the tokenizer {tokenizer}; raise it or leave it out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _build_model(shape, size, words.eos_token_id).save_pretrained(output)
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}, indent=1))
    return output


def _build_model(shape: Shape, vocab_size: int, end: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    common: dict[str, Any] = dict(
        vocab_size=vocab_size, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context, tie_word_embeddings=shape.tied, initializer_range=shape.initializer_range,
        # No padding id in the model: transformers would zero its embedding and leave it out of the gradient.
        bos_token_id=None, eos_token_id=end, pad_token_id=None)
    if not shape.experts:
        return Qwen3ForCausalLM(Qwen3Config(**common))
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **common, num_experts=shape.experts, num_experts_per_tok=shape.active_experts, moe_intermediate_size=shape.intermediate,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[]))


def _own_tokenizer(output: Path, vocab_size: int, context: int) -> PreTrainedTokenizerBase:
    from examples.quickstart.tokenizer import SPECIAL, VOCABULARY_MULTIPLE, build_tokenizer

    if vocab_size <= len(SPECIAL) or vocab_size % VOCABULARY_MULTIPLE:
        raise ValueError(f"vocab_size={vocab_size}: the own tokenizer needs more than {len(SPECIAL)} entries and a multiple of {VOCABULARY_MULTIPLE}")
    tokenizer = build_tokenizer([f"w{i}" for i in range(vocab_size - len(SPECIAL))])
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(output)
    return tokenizer


def _copy_tokenizer(output: Path, source: str | Path, chat_template: str | Path | None) -> PreTrainedTokenizerBase:
    from megatron_antisd.data import load_tokenizer

    if not any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(f"{source} holds neither tokenizer.json nor tokenizer.model; expected the directory of a Hugging Face tokenizer")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, output / name)
    if chat_template is not None:
        shutil.copyfile(chat_template, output / "chat_template.jinja")
    tokenizer = load_tokenizer(output, sys.maxsize)  # the model's vocabulary is made to fit
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {source} has no chat template; name one with --chat-template FILE")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {source} names no end token; set eos_token in its tokenizer_config.json")
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="A tiny Hugging Face checkpoint (Qwen3 or Qwen3-MoE) with random weights.")
    parser.add_argument("--output", required=True, help="directory to write; must be empty or new")
    parser.add_argument("--tokenizer", help="directory of a Hugging Face tokenizer; without it an own one of words w0 w1 ...")
    parser.add_argument("--chat-template", help="Jinja file; needed where the tokenizer has none")
    parser.add_argument("--vocab-size", type=int, help="default: 512, or what the given tokenizer needs")
    parser.add_argument("--seed", type=int, default=0)
    for name, field in Shape.__dataclass_fields__.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", dest=name)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help="default: %(default)s", dest=name)
    given = vars(parser.parse_args(arguments))
    shape = Shape(**{name: given[name] for name in Shape.__dataclass_fields__})
    try:
        path = make_tiny_checkpoint(given["output"], shape=shape, vocab_size=given["vocab_size"], tokenizer=given["tokenizer"],
                                    chat_template=given["chat_template"], seed=given["seed"])
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {path}")
    return 0
