"""A small real tokenizer (byte-level BPE with merges, ChatML template), and the way to the real data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CORPUS = [
    "Your previous attempt:\n", "Previous assessment: Your answer is incorrect.\n\n", "Now solve this problem step by step.\n",
    "We add the numbers and get the answer, which is \\boxed{12}. So the answer is correct.\n\n", "Let x be the sum of 12 and 30.\n",
] * 4


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Merges across words' letters, single bytes for everything the corpus lacks (so one emoji is four tokens)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by ANTISD_DATA: published data sets, tokenizers and goldens."""
    folder = os.environ.get("ANTISD_DATA")
    if not folder:
        pytest.skip("ANTISD_DATA is not set")
    return Path(folder)
