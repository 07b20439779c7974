#!/usr/bin/env python
"""Published data sets -> JSON lines of this project: tools/prepare_data.py NAME [...]; --help and docs/data.md say how."""

import sys

from megatron_antisd.prepare.commands import main

if __name__ == "__main__":
    sys.exit(main())
