"""`python -m megatron_antisd.reporting plot|report|compare`."""

import sys

from megatron_antisd.reporting.commands import main

if __name__ == "__main__":
    sys.exit(main())
