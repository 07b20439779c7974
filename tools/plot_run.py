#!/usr/bin/env python
"""Curves of one run or several in one picture: tools/plot_run.py RUN [RUN ...] [--output FILE]."""

import sys

from megatron_antisd.reporting.commands import plot_main

if __name__ == "__main__":
    sys.exit(plot_main())
