"""A small real tokenizer, and the way to the real data where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chat import chat_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return chat_tokenizer()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by ANTISD_DATA: published data sets, tokenizers and goldens."""
    folder = os.environ.get("ANTISD_DATA")
    if not folder:
        pytest.skip("ANTISD_DATA is not set")
    return Path(folder)
