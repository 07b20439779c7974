#!/usr/bin/env python
"""Print docs/configuration_keys.md, made from the schema: tools/config_reference.py > docs/configuration_keys.md."""

from megatron_antisd.config.reference import reference_markdown

if __name__ == "__main__":
    print(reference_markdown(), end="")
