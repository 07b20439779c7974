#!/usr/bin/env python
"""What the teachers of saved rollouts really saw: tools/context_audit.py RUN_OR_FILE [...]; --help and docs/audit.md say more."""

import sys

from megatron_antisd.audit.commands import main

if __name__ == "__main__":
    sys.exit(main())
