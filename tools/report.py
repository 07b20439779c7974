#!/usr/bin/env python
"""Table 1, Figure 3 and Figure 4 of finished runs: tools/report.py RUN [RUN ...] [--output DIR] [--baseline METHOD]."""

import sys

from megatron_antisd.reporting.commands import results_main

if __name__ == "__main__":
    sys.exit(results_main())
