"""Settings that hold for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Two ranks on two cores: more threads a rank only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the tests may reach out for a model or a data set.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by ANTISD_DATA: published data sets, tokenizers and goldens."""
    folder = os.environ.get("ANTISD_DATA")
    if not folder:
        pytest.skip("ANTISD_DATA is not set")
    return Path(folder)
