"""A small real tokenizer."""

from __future__ import annotations

import pytest
from chat import chat_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer()
