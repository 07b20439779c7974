#!/usr/bin/env python
"""A tiny checkpoint with random weights: tools/make_tiny_checkpoint.py --output DIR [--tokenizer DIR --chat-template FILE] [--layers N ...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/ is beside the package, not in it

from examples.tiny_checkpoint import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
