#!/usr/bin/env python
"""Hugging Face checkpoint -> checkpoint of this project; --help and docs/conversion.md say how."""

import sys

from megatron_antisd.convert.commands import hf_to_megatron

if __name__ == "__main__":
    sys.exit(hf_to_megatron())
