"""Tokenizers as checkpoints carry them: tokenizer.json, and tokenizer.model read as the sentencepiece library reads it."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase

from megatron_antisd.config import ConfigError, DataConfig, PrivilegedConfig
from megatron_antisd.data import PromptBuilder, load_tokenizer, stop_token_ids
from megatron_antisd.records import Problem, Rollout, RolloutGroup

CORPUS = [
    "We add the numbers and get the answer, which is 12 + 30 = 42.", "Let x be the sum; then x - 7 is 35.", "def f(x):\treturn x * 10",
    "東京に行く。今日は良い天気です。", "Now solve this problem step by step.", "Your previous attempt was incorrect.", "user assistant system",
]
ALPHABET = "abc XYZ  \n\t0123.,<>_é日本語ｶﾞ😀ﬁe\u0301\u3000\u200b①👨\u200d👩\u200d👧▁"
TEXTS = [
    "", " ", "\n", "Hello world", "  lead  and   trail  ", "a\tb\n\n\nc\r\n", "3.14159 1234567", "東京に行く①", "e\u0301 cafe\u0301", "ｶﾞｷﾞ ﷺ", "가",
    "👨\u200d👩\u200d👧 family 🇯🇵", "\u200bzero", "x" * 300, "def f(x):\n    return x\n", "<0x0A> ▁ literal", "\\boxed{\\frac{1}{2}} $x^2$",
] + ["".join(random.Random(seed).choices(ALPHABET, k=40)) for seed in range(150)]
KINDS = {
    "bpe bytes": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "unigram bytes": dict(model_type="unigram", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "unigram nfkc": dict(model_type="unigram"),  # the trainer's defaults: nmt_nfkc, runs of spaces made one, unknown characters
    "bpe nfkc, no prefix": dict(model_type="bpe", add_dummy_prefix=False),
}
LOSSLESS = ["bpe bytes", "unigram bytes"]
PUBLIC = ["test_model.model", "test_ja_model.model"]
CHAT = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def train(**options: Any) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 5), model_writer=written, vocab_size=400, hard_vocab_limit=False,
                                             minloglevel=2, **options)
    return written.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {name: train(**options) for name, options in KINDS.items()}


@pytest.fixture(params=[*KINDS, *PUBLIC])
def model(request: pytest.FixtureRequest, models: dict[str, bytes]) -> bytes:
    if request.param in models:
        return models[request.param]
    return (request.getfixturevalue("real_data") / "sentencepiece" / request.param).read_bytes()


def library(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def checkpoint(folder: Path, model: bytes, **tokenizer_config: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    if tokenizer_config:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def load(folder: Path, vocab_size: int = 10_000) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, vocab_size)


def chat_tokenizer(folder: Path, model: bytes, **more: Any) -> PreTrainedTokenizerBase:
    return load(checkpoint(folder, model, **{"chat_template": CHAT_TEMPLATE, "eos_token": CHAT[1], "additional_special_tokens": CHAT, **more}))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- ids, text and offsets -----------------------------------------------------------------------------------------------------------

def test_ids_and_text_are_the_librarys(model: bytes, tmp_path: Path) -> None:
    tokenizer, reference = load(checkpoint(tmp_path, model)), library(model)
    for text in TEXTS:
        ids = reference.encode(text)
        assert encode(tokenizer, text) == ids == tokenizer.encode(text), text
        known = [i for i in ids if i != reference.unk_id()]
        assert tokenizer.decode(known) == reference.decode(known) == tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.convert_ids_to_tokens(ids) == [reference.id_to_piece(i) for i in ids]
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
    assert tokenizer(TEXTS, add_special_tokens=False)["input_ids"] == [reference.encode(text) for text in TEXTS]
    assert tokenizer.get_vocab() == {reference.id_to_piece(i): i for i in range(reference.get_piece_size())}


@pytest.mark.parametrize("name", LOSSLESS)
def test_text_survives(models: dict[str, bytes], tmp_path: Path, name: str) -> None:
    tokenizer = chat_tokenizer(tmp_path, models[name])
    for text in TEXTS:
        for whole in (text, f"<|im_start|>{text}<|im_end|>\n<|im_start|>{text}"):
            if "▁" not in whole:  # the library reads it as a space
                assert tokenizer.decode(encode(tokenizer, whole)) == whole


def test_offsets_are_ordered_and_cover_the_text(model: bytes, tmp_path: Path) -> None:
    tokenizer, reference = chat_tokenizer(tmp_path, model), library(model)
    for text in [*TEXTS, *(f"{text}<|im_end|>\n<|im_start|>user\n{text}" for text in TEXTS)]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        assert len(ids) == len(offsets) and ids == encode(tokenizer, text)
        starts = [start for start, _ in offsets]
        assert starts == sorted(starts) and all(0 <= a <= b <= len(text) for a, b in offsets)
        covered = {i for a, b in offsets for i in range(a, b)}
        # Without a token are only characters that the model's normalisation drops: spaces, and zero-width ones.
        assert all(not reference.normalize(text[i]).strip("▁") for i in set(range(len(text))) - covered), text
        for index, (a, b) in zip(ids, offsets, strict=True):
            if index in tokenizer.added_tokens_decoder and index != tokenizer.unk_token_id:
                assert text[a:b] == tokenizer.convert_ids_to_tokens(index)


@pytest.mark.parametrize("name", LOSSLESS)
def test_each_tokens_offsets_are_its_text(models: dict[str, bytes], tmp_path: Path, name: str) -> None:
    tokenizer, reference = load(checkpoint(tmp_path, models[name])), library(models[name])
    for text in TEXTS:
        encoding = tokenizer(text, return_offsets_mapping=True)
        for index, (a, b) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            if reference.is_byte(index):
                assert b - a == 1 and int(reference.id_to_piece(index)[1:-1], 16) in text[a:b].encode()
            else:  # the space put before a text is no character of it
                assert reference.id_to_piece(index) in (text[a:b].replace(" ", "▁"), "▁" + text[a:b].replace(" ", "▁"))


def test_offsets_with_bos_and_batches(models: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path, models["bpe bytes"], add_bos_token=True)
    single, batch = tokenizer("12 😀", return_offsets_mapping=True), tokenizer(["12 😀", "x"], return_offsets_mapping=True)
    assert single["input_ids"][0] == tokenizer.bos_token_id and single["offset_mapping"][0] == (0, 0)
    assert single["offset_mapping"][-4:] == [(3, 4)] * 4  # four bytes, one character
    assert batch["input_ids"][0] == single["input_ids"] and batch["offset_mapping"][0] == single["offset_mapping"]
    with pytest.raises(NotImplementedError, match="truncated"):
        tokenizer("12 30 7", return_offsets_mapping=True, truncation=True, max_length=2)


# --- special tokens ------------------------------------------------------------------------------------------------------------------

def test_special_tokens_are_never_split(model: bytes, tmp_path: Path) -> None:
    tokenizer, reference = chat_tokenizer(tmp_path, model), library(model)
    size = reference.get_piece_size()
    named = {"<s>": reference.bos_id(), "</s>": reference.eos_id(), "<unk>": reference.unk_id(), "<|im_end|>": size, "<|im_start|>": size + 1}
    for content, index in named.items():
        assert encode(tokenizer, f"12{content}30{content}") == [*reference.encode("12"), index, *reference.encode("30"), index]
        assert tokenizer.decode([index]) == content and tokenizer.decode([index], skip_special_tokens=True) == ""
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (reference.bos_id(), size, None)
    assert len(tokenizer) == size + 2 and tokenizer.decode([size + 9]) == ""  # an id that fills up a model's vocabulary


@pytest.mark.parametrize("legacy", [True, False])
def test_the_space_before_a_text(models: dict[str, bytes], tmp_path: Path, legacy: bool) -> None:
    tokenizer = chat_tokenizer(tmp_path, models["bpe bytes"], legacy=legacy)
    first, second, third = "".join(tokenizer.tokenize("user<|im_end|>user<|im_end|> user")).split("<|im_end|>")
    assert (first, second, third) == ("▁user", "▁user" if legacy else "user", "▁▁user" if legacy else "▁user")
    assert tokenizer.tokenize("<|im_end|>user")[1].startswith("▁") is legacy
    for text in ("user<|im_end|>user<|im_end|> user", "<|im_end|>user", " user"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    bare = load(checkpoint(tmp_path, models["bpe bytes"], add_prefix_space=False))
    assert bare.tokenize("user")[0][0] == "u" and bare.decode(encode(bare, " user")) == " user"


def test_ids_of_added_tokens_decoder(models: dict[str, bytes], tmp_path: Path) -> None:
    """A hole in the ids, a token in the place of a piece, one that is not special, one that takes in the space behind it."""
    reference = library(models["bpe bytes"])
    size = reference.get_piece_size()
    added = {7: ("<|im_start|>", True, False), size + 5: ("<|im_end|>", True, True), size + 6: ("<think>", False, False)}
    given = {str(i): {"content": text, "special": special, "rstrip": rstrip, "lstrip": False, "normalized": False, "single_word": False}
             for i, (text, special, rstrip) in added.items()}
    tokenizer = chat_tokenizer(tmp_path, models["bpe bytes"], added_tokens_decoder=given, additional_special_tokens=[*CHAT, "<new>"])
    encoding = tokenizer("<|im_start|>12<|im_end|> \n30<think><new>", add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == [7, *reference.encode("12"), size + 5, *reference.encode("30"), size + 6, size + 7]
    assert (14, 24) in encoding["offset_mapping"] and tokenizer.get_vocab()["<new>"] == size + 7
    assert tokenizer.decode([7, size + 5, size + 6], skip_special_tokens=True) == "<think>"


def test_the_longest_token_and_whole_words(models: dict[str, bytes], tmp_path: Path) -> None:
    plain = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    size = library(models["bpe bytes"]).get_piece_size()
    given = {size: "<a>", size + 1: "<a><b>", size + 2: "word", size + 3: "<left>"}
    tokenizer = chat_tokenizer(tmp_path, models["bpe bytes"], added_tokens_decoder={
        str(i): {**plain, "content": text, "single_word": text == "word", "lstrip": text == "<left>"} for i, text in given.items()})
    added = [i for i in encode(tokenizer, "<a><b><a><c> word, sword words  <left>") if i >= size]
    assert added == [size + 1, size, size + 2, size + 3]
    assert tokenizer.tokenize("12  <left>") == [*tokenizer.tokenize("12"), "<left>"]


def test_control_symbols_and_other_files(tmp_path: Path) -> None:
    """Tokens of the model itself; special_tokens_map.json and chat_template.jinja without a tokenizer_config.json."""
    model = train(model_type="bpe", byte_fallback=True, control_symbols=CHAT, user_defined_symbols=["<think>"])
    folder = checkpoint(tmp_path, model)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False,
                                                                             "rstrip": False, "single_word": False}}))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = load(folder)
    start, end = (library(model).piece_to_id(token) for token in CHAT)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "12<think>"}], return_dict=False)
    assert tokenizer.eos_token_id == end and (ids[0], ids.count(end)) == (start, 1)
    assert library(model).piece_to_id("<think>") in ids
    assert stop_token_ids(tokenizer, folder) == (end,)


# --- prompts -------------------------------------------------------------------------------------------------------------------------

def test_prompts_of_student_and_teacher(model: bytes, tmp_path: Path) -> None:
    """The solution is cut at a token's first character, and what remains is its exact end."""
    tokenizer = chat_tokenizer(tmp_path, model)
    solution = "Let x be the sum; then x is 42. <|im_end|> " * 6 + "So the answer is 42"
    privileged = PrivilegedConfig(solution_tokens=12, minimum_solution_tokens=1)
    prompts = PromptBuilder(tokenizer, DataConfig(train=("x.jsonl",), chat_template_kwargs={"enable_thinking": False}), privileged, 4096)
    problem = Problem(id="p", prompt="2+2?", answer="4")
    text = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True,
                                         enable_thinking=False) == text
    assert prompts.student_prompt(problem) == tuple(encode(tokenizer, text))
    rollouts = [Rollout(problem_id="p", index=i, prompt_ids=(1,), response_ids=(5,), engine_log_probs=(0.0,), truncated=False, policy_version=0,
                        text=answer).graded(float(i == 0), f"feedback {i}") for i, answer in enumerate([solution, "wrong"])]
    view = prompts.privileged_views(RolloutGroup(problem=problem, rollouts=tuple(rollouts)), seed=0, step=0)[1].view
    shown = solution.replace("<|im_end|>", "")
    tails = [shown[i:] for i in range(len(shown)) if len(encode(tokenizer, shown[i:])) <= 12]
    templates = {privileged.template.format(problem="2+2?", solution=tail, feedback="feedback 1"): tail for tail in tails}
    made = [tail for content, tail in templates.items() if view.prompt_ids == tuple(encode(tokenizer, text.replace("2+2?", content)))]
    assert made and 0 < len(made[0]) < len(shown)
    assert view.prompt_ids.count(tokenizer.eos_token_id) == 1  # the solution cannot end the turn


# --- what is refused -----------------------------------------------------------------------------------------------------------------

def test_broken_models_are_named(models: dict[str, bytes], tmp_path: Path) -> None:
    whole = models["bpe bytes"]
    pieces = sentencepiece_model_pb2.ModelProto.FromString(models["unigram nfkc"])
    pieces.ClearField("trainer_spec")
    broken = {
        b"": "tokenizer.model is empty", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "is a Git LFS pointer.*git lfs pull",
        whole[: len(whole) // 2]: "not a whole SentencePiece model", pieces.SerializeToString(): "no trainer or normalizer settings",
        b"IQ== 0\nIg== 1\n": "not a whole SentencePiece model.*tiktoken",
    }
    for content, message in broken.items():
        with pytest.raises(ConfigError, match=message):
            load(checkpoint(tmp_path, content))


def test_disagreeing_files_are_named(models: dict[str, bytes], tmp_path: Path) -> None:
    moved = {"0": {"content": "<s>", "special": True}}  # <s> is piece 1
    with pytest.raises(ConfigError, match="'<s>' has id 0 .* but 1 in tokenizer.model"):
        load(checkpoint(tmp_path, models["bpe bytes"], added_tokens_decoder=moved))
    size = library(models["bpe bytes"]).get_piece_size()
    folder = checkpoint(tmp_path, models["bpe bytes"], pad_token="[PAD]")
    assert load(folder, size + 1).pad_token_id == size
    with pytest.raises(ConfigError, match=f"ids up to {size}, but the model's vocab_size is {size}"):
        load(folder, size)


def test_no_tokenizer_and_no_end_token(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer in .*tokenizer.json, tokenizer.model"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json.* cannot be loaded"):
        load(tmp_path)
    endless = load(checkpoint(tmp_path / "..", train(model_type="bpe", eos_id=-1)).resolve())
    with pytest.raises(ConfigError, match="names an end token"):
        stop_token_ids(endless, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    assert stop_token_ids(endless, tmp_path) == (1, 3)


# --- tokenizer.json ------------------------------------------------------------------------------------------------------------------

def test_tokenizer_json_goes_before_tokenizer_model(tokenizer: PreTrainedTokenizerBase, models: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(models["bpe bytes"])
    loaded = load(tmp_path)
    assert all(loaded(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)
    assert loaded.get_vocab() == tokenizer.get_vocab() and stop_token_ids(loaded, tmp_path) == (tokenizer.eos_token_id,)


def test_qwen3_goldens(real_data: Path) -> None:
    """Every text of the goldens; the chat goldens are in test_published_data.py."""
    tokenizer = load_tokenizer(real_data / "tokenizer" / "qwen3", 151_936)
    lines = (real_data / "goldens" / "qwen3_tokenizer_golden.dev.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    for golden in map(json.loads, lines):
        encoding = tokenizer(golden["text"], return_offsets_mapping=True)
        assert encoding["input_ids"] == golden["ids"], golden["id"]
        assert tokenizer.decode(golden["ids"]) == golden["roundtrip"], golden["id"]


@pytest.mark.parametrize(("config", "template"), [
    ("qwen3/tokenizer_config.json", "qwen3_chat_template.jinja"),
    ("qwen3-4b-2507/tokenizer_config.instruct-2507.json", "qwen3-4b-instruct-2507_chat_template.jinja"),
    ("qwen3-4b-2507/tokenizer_config.thinking-2507.json", None),
])
def test_qwen3_configurations(real_data: Path, tmp_path: Path, config: str, template: str | None) -> None:
    """A checkpoint's own tokenizer_config.json brings its template; a chat_template.jinja beside it goes before."""
    source = real_data / "tokenizer"
    shutil.copyfile(source / "qwen3" / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.copyfile(source / config, tmp_path / "tokenizer_config.json")
    tokenizer = load_tokenizer(tmp_path, 151_936)
    assert stop_token_ids(tokenizer, tmp_path) == (151_645,)
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], tokenize=False, add_generation_prompt=True)
    if template:
        assert tokenizer.chat_template == (source / template).read_text(encoding="utf-8") and turn.endswith("<|im_start|>assistant\n")
    else:
        assert turn.endswith("<|im_start|>assistant\n<think>\n")  # it always thinks
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(tmp_path, 151_936).chat_template == "{{ messages[0].content }}"
