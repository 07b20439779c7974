#!/usr/bin/env python
"""Scored rollouts token by token, as one HTML page: tools/u_lens.py RUN_OR_FILES... [--output page.html] [--steps 10 20]."""

import sys

from megatron_antisd.reporting.commands import u_lens_main

if __name__ == "__main__":
    sys.exit(u_lens_main())
