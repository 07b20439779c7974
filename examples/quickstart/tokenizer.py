"""The quickstart's tokenizer: one word, one token, with a chat template. Loads with `AutoTokenizer.from_pretrained`."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
SYSTEM, USER, ASSISTANT = "<system>", "<user>", "<assistant>"
VOCABULARY_MULTIPLE = 32
"""Reserved words fill the vocabulary up to a multiple of this, so that it splits evenly over tensor-parallel ranks."""
SPECIAL = (PAD, END, UNKNOWN, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message['role'] + ', expected system, user or assistant') -}}"
    "{%- endif -%}"
    "{%- if not loop.first -%}{{- ' ' -}}{%- endif -%}"
    "{{- '<' + message['role'] + '> ' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- ' <eos>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' <assistant>' -}}{%- endif -%}"
)


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `words`. Decoding joins with single spaces, so `decode(encode(text)) == text` for text of known
    words separated by single spaces. Raises ValueError for repeated words, or words that whitespace would split."""
    bad = [word for word in words if len(word.split()) != 1]
    if bad or len(set(words)) != len(words) or set(words) & set(SPECIAL):
        raise ValueError(f"words must differ, hold no whitespace and be none of {SPECIAL}; got {len(words)} words, "
                         f"{len(words) - len(set(words))} repeated, with whitespace: {bad}")
    entries = [*SPECIAL, *words]
    entries += [f"<reserved{index}>" for index in range(-len(entries) % VOCABULARY_MULTIPLE)]
    vocabulary = {word: index for index, word in enumerate(entries)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=256,
    )
