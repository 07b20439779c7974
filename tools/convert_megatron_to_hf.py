#!/usr/bin/env python
"""checkpoint of this project -> Hugging Face checkpoint; --help and docs/conversion.md say how."""

import sys

from megatron_antisd.convert.commands import megatron_to_hf

if __name__ == "__main__":
    sys.exit(megatron_to_hf())
