"""The tokenizer of a Hugging Face checkpoint: `tokenizer.json`, a SentencePiece `tokenizer.model`, or `vocab.json` with its merges.

Files are only read here. A checkpoint that is written gets copies of them (parallel/reshard.py), so what was loaded is what is kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_antisd.config import ConfigError
from megatron_antisd.config.rules import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(path: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Raises ConfigError where `path` holds no tokenizer, a broken one, or one with ids beyond the model's `vocab_size`."""
    folder = Path(path)
    vocabulary = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if vocabulary is None:
        raise ConfigError(f"model.path: no tokenizer in {folder} (looked for {', '.join(TOKENIZER_FILES)}); copy the model's tokenizer files there")
    with vocabulary.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if not head:
        raise ConfigError(f"model.path: {vocabulary} is empty; download it again")
    if head == LFS_POINTER:
        raise ConfigError(f"model.path: {vocabulary} is a Git LFS pointer, not the file itself; run `git lfs pull` in {folder}")
    tokenizer = _load_sentencepiece(vocabulary) if vocabulary.name == "tokenizer.model" else _load_huggingface(vocabulary)
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ConfigError(f"model.path: the tokenizer in {path} has ids up to {largest}, but the model's vocab_size is {vocab_size}; "
                          "the two do not belong together")
    return tokenizer


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> tuple[int, ...]:
    """The tokenizer's end token and those of generation_config.json (Qwen3 has two). Raises ConfigError where there is none."""
    found = {tokenizer.eos_token_id}
    generation = Path(path) / "generation_config.json"
    if generation.is_file():
        ids = json.loads(generation.read_text()).get("eos_token_id")
        found |= set(ids if isinstance(ids, list) else [ids])
    stop = tuple(sorted(i for i in found if i is not None))
    if not stop:
        raise ConfigError(f"model.path: neither the tokenizer nor generation_config.json in {path} names an end token; set eos_token")
    return stop


def _load_huggingface(vocabulary: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(vocabulary.parent)
    except Exception as error:  # `tokenizers` raises Exception itself for a file it cannot read
        raise ConfigError(f"model.path: the tokenizer in {vocabulary.parent} ({vocabulary.name}) cannot be loaded: {error}") from error


def _load_sentencepiece(vocabulary: Path) -> PreTrainedTokenizerBase:
    from megatron_antisd.data.sentencepiece_tokenizer import SentencePieceTokenizer

    _check_sentencepiece(vocabulary)
    try:
        # Named here, since transformers would rather take a tekken.json that lies beside it.
        return SentencePieceTokenizer.from_pretrained(vocabulary.parent, vocab_file=str(vocabulary))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model.path: the tokenizer in {vocabulary.parent} ({vocabulary.name}) cannot be loaded: {error}") from error


def _check_sentencepiece(vocabulary: Path) -> None:
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    serialized = vocabulary.read_bytes()
    expected = f"model.path: {vocabulary} is not a whole SentencePiece model"
    advice = "download it again; a vocabulary of another kind (tiktoken) has to be converted to tokenizer.json"
    try:
        proto = ModelProto.FromString(serialized)
        SentencePieceProcessor(model_proto=serialized)
    except (DecodeError, RuntimeError) as error:
        raise ConfigError(f"{expected} ({len(serialized)} bytes: {error}); {advice}") from error
    # The pieces come first: a file cut between two of them can be read, as a smaller model with default settings.
    if not (proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise ConfigError(f"{expected} ({len(serialized)} bytes with {len(proto.pieces)} pieces, but no trainer or normalizer settings); {advice}")
