"""A SentencePiece model (`tokenizer.model`) behind the interface of a Hugging Face tokenizer.

Every text is cut into ids by the `sentencepiece` library itself. Conversions to a `tokenizers` model exist, but give other ids: their
normalisation works on grapheme clusters, and whitespace runs, texts' edges and the ends of unknown stretches differ.

Special tokens are the one thing that the library does not read out of a text, and a chat template writes them there. They are found
first, and each stretch between them is encoded on its own, with the space that the model puts before a text (`legacy: false` in
tokenizer_config.json: only at the very beginning; `add_prefix_space: false`: nowhere).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer

SPACES = re.compile(r"\s*")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class SentencePieceTokenizer(PreTrainedTokenizer):
    """Reads `tokenizer.model` and, through `from_pretrained`, the other tokenizer files of a checkpoint. Special are the model's own control
    and unknown pieces and what those files name. Raises ValueError where files and model disagree on a token's id."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file: str, *, legacy: bool | None = True, add_prefix_space: bool | None = True, add_bos_token: bool = False,
                 add_eos_token: bool = False, **files: Any) -> None:
        model = Path(vocab_file).read_bytes()
        self._pieces = SentencePieceProcessor(model_proto=model)
        self._encode_bare = _changed(model, add_dummy_prefix=False)
        self._decode_bare = _changed(model, add_dummy_prefix=False, remove_extra_whitespaces=False)  # either one strips a leading space
        # None, as old files have it, means the default.
        self._prefix_first = add_prefix_space is None or add_prefix_space
        self._prefix_inside = self._prefix_first and (legacy is None or legacy)
        for name in NAMED:
            own = getattr(self._pieces, name.removesuffix("_token") + "_id")()
            if own >= 0:
                files.setdefault(name, self._pieces.id_to_piece(own))
        files["extra_special_tokens"] = [*_tokens(files.pop("additional_special_tokens", None)), *_tokens(files.get("extra_special_tokens"))]
        self._added_tokens_decoder = _added_tokens(self._pieces, files)
        files.pop("added_tokens_decoder", None)
        self._find_added = _AddedTokens(self._added_tokens_decoder)
        ends = [name for name, wanted in (("bos", add_bos_token), ("eos", add_eos_token)) if wanted]
        super().__init__(**files, special_tokens_pattern="_".join(ends) or "none")

    @property
    def is_fast(self) -> bool:
        """Whether character offsets can be had, which is what callers ask by this name."""
        return True

    @property
    def vocab_size(self) -> int:
        """Pieces of the model, without added tokens."""
        return self._pieces.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.convert_ids_to_tokens(i): i for i in range(self.vocab_size)} | self._added_tokens_encoder

    def encode_with_offsets(self, text: str, *, split_special_tokens: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters [start, end) of `text` it stands for. The bytes of one character all have that character."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, added in self._stretches(text, split_special_tokens):
            if added is not None:
                ids.append(added)
                offsets.append((start, end))
                continue
            pieces = self._pieces if self._has_prefix(at_start=start == 0) else self._encode_bare
            found = pieces.encode(text[start:end], return_type="offset_mapping")
            ids += found["ids"]
            offsets += [(start + a, start + b) for a, b in self._whole_characters(found["ids"], found["offsets"])]
        return ids, offsets

    def tokenize(self, text: str, **options: Any) -> list[str]:
        ids, _ = self.encode_with_offsets(text, split_special_tokens=options.get("split_special_tokens", self.split_special_tokens))
        return self.convert_ids_to_tokens(ids)

    def _encode_plus(self, text: Any, text_pair: Any = None, *, return_offsets_mapping: bool = False, **options: Any) -> BatchEncoding:
        encoding = super()._encode_plus(text, text_pair, **options)
        if not return_offsets_mapping:
            return encoding
        texts = [text] if isinstance(text, str) else text
        if text_pair is not None or not all(isinstance(one, str) for one in texts):
            raise NotImplementedError("offsets of text pairs and of texts in words are not supported; encode one text, or a list of texts")
        ends = self.special_tokens_pattern.split("_") if options.get("add_special_tokens", True) else []
        before, after = [[(0, 0)] * (end in ends) for end in ("bos", "eos")]
        split = options.get("split_special_tokens", self.split_special_tokens)
        offsets = [[*before, *self.encode_with_offsets(one, split_special_tokens=split)[1], *after] for one in texts]
        rows = [encoding["input_ids"]] if isinstance(text, str) else encoding["input_ids"]
        if [len(row) for row in rows] != [len(row) for row in offsets]:
            raise NotImplementedError("offsets of truncated, padded or tensor output are not supported; leave out the option")
        encoding["offset_mapping"] = offsets[0] if isinstance(text, str) else offsets
        return encoding

    def _decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """Ids that are neither a piece nor an added token (a model's vocabulary may be filled up) have no text, as in `tokenizers`."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        parts: list[str] = []
        run: list[int] = []
        prefix = self._has_prefix(at_start=True)
        for index in [*ids, None]:
            added = self._added_tokens_decoder.get(index)
            if index is not None and added is None:
                run += [index] if 0 <= index < self.vocab_size else []
                continue
            skipped = skip_special_tokens and added is not None and added.special
            unknown = index == self._pieces.unk_id()
            if skipped and unknown:
                continue  # in the middle of a text, which goes on
            if run:
                parts.append((self._pieces if prefix else self._decode_bare).decode(run))
            run = []
            prefix = not unknown and self._has_prefix(at_start=False)
            if added is not None and not skipped:
                parts.append(added.content)
        return "".join(parts)

    def _stretches(self, text: str, split_special_tokens: bool) -> Iterator[tuple[int, int, int | None]]:
        """Start, end and, for an added token, its id. Space that a token takes in beside it (`lstrip`, `rstrip`) is in no stretch."""
        position = 0
        for start, end, index in () if split_special_tokens else self._find_added(text):
            token = self._added_tokens_decoder[index]
            stop = position + len(text[position:start].rstrip()) if token.lstrip else start
            if stop > position:
                yield position, stop, None
            yield start, end, index
            position = SPACES.match(text, end).end() if token.rstrip else end
        if position < len(text):
            yield position, len(text), None

    def _has_prefix(self, *, at_start: bool) -> bool:
        return self._prefix_first if at_start else self._prefix_inside

    def _whole_characters(self, ids: Sequence[int], offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The library gives a character of several bytes to the last of them and an empty span to the others."""
        for i in reversed(range(len(ids) - 1)):
            start, end = offsets[i]
            if start == end == offsets[i + 1][0] and self._pieces.is_byte(ids[i]) and self._pieces.is_byte(ids[i + 1]):
                offsets[i] = offsets[i + 1]
        return offsets

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces.id_to_piece(index) if 0 <= index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))


class _AddedTokens:
    """Finds added tokens in a text, the longest one at each place. Some models have a thousand of them: no pattern with so many
    alternatives, but a look into a table wherever the first character of one stands."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._ids = {token.content: (index, token.single_word) for index, token in tokens.items()}
        self._lengths: dict[str, list[int]] = {}
        for length, first in sorted({(len(content), content[0]) for content in self._ids}, reverse=True):
            self._lengths.setdefault(first, []).append(length)
        self._first = re.compile("[" + re.escape("".join(self._lengths)) + "]")

    def __call__(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, end and id, from left to right, without overlap."""
        position = 0
        for candidate in self._first.finditer(text):
            start = candidate.start()
            if start < position:
                continue
            for length in self._lengths[text[start]]:
                index, single_word = self._ids.get(text[start : start + length], (None, False))
                if index is not None and not (single_word and _inside_word(text, start, start + length)):
                    position = start + length
                    yield start, position, index
                    break


def _inside_word(text: str, start: int, end: int) -> bool:
    return any(re.match(r"\w", beside) for beside in (text[start - 1 : start], text[end : end + 1]))


def _changed(model: bytes, **normalizer: bool) -> SentencePieceProcessor:
    proto = ModelProto.FromString(model)
    for name, value in normalizer.items():
        setattr(proto.normalizer_spec, name, value)
    return SentencePieceProcessor(model_proto=proto.SerializeToString())


def _tokens(given: Any) -> list[str | AddedToken]:
    """The forms that a list of special tokens has in published files: texts, objects, and names with either of them."""
    values = given.values() if isinstance(given, dict) else given or []
    return [AddedToken(**{"normalized": False, **value, "special": True}) if isinstance(value, dict) else value for value in values]


def _added_tokens(pieces: SentencePieceProcessor, files: Mapping[str, Any]) -> dict[int, AddedToken]:
    """All tokens that are looked for in a text, by id: the model's control pieces, those with an id in the files, then those with a name only,
    which get the id of their piece, or the next free one."""
    own = [i for i in range(pieces.get_piece_size()) if pieces.is_control(i) or pieces.is_unknown(i)]
    added = {i: AddedToken(pieces.id_to_piece(i), special=True, normalized=False) for i in own}
    by_name = {token.content: i for i, token in added.items()}
    for i, token in files.get("added_tokens_decoder", {}).items():
        piece = _piece_id(pieces, token.content)
        if piece not in (None, i):
            raise ValueError(f"the token {token.content!r} has id {i} in the tokenizer's files, but {piece} in tokenizer.model; ids that are moved "
                             "(as for XLM-RoBERTa) are not supported, give the checkpoint a tokenizer.json instead")
        added[i], by_name[token.content] = token, i
    named = [files.get(name) for name in PreTrainedTokenizer.SPECIAL_TOKENS_ATTRIBUTES]
    more = list(files.get("model_specific_special_tokens", {}).values())
    for token in [*named, *more, *files["extra_special_tokens"]]:
        content = token.content if isinstance(token, AddedToken) else token
        if not content:
            continue
        if content not in by_name:
            piece = _piece_id(pieces, content)
            by_name[content] = max(pieces.get_piece_size(), *(i + 1 for i in added)) if piece is None else piece
        elif not isinstance(token, AddedToken):
            token = added[by_name[content]]
        flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word} if isinstance(token, AddedToken) else {}
        added[by_name[content]] = AddedToken(content, **flags, special=True, normalized=False)
    return added


def _piece_id(pieces: SentencePieceProcessor, content: str) -> int | None:
    """None where the model has no such piece; the library then gives the id of the unknown piece."""
    index = pieces.piece_to_id(content)
    return index if pieces.id_to_piece(index) == content else None
