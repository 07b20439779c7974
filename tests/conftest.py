"""Settings that hold for every test."""

from __future__ import annotations

import os

# Two ranks on two cores: more threads a rank only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the tests may reach out for a model or a data set.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
