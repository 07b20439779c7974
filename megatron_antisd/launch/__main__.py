"""`python -m megatron_antisd.launch ARGUMENTS OF TORCHRUN`: torchrun, but ready for a scheduler's signals.

Two defaults lie under the arguments: SIGUSR1 goes to the ranks as well (torchrun alone would die of it), and they have 120 s after a signal to
come to a boundary and save. Where the ranks left preempted the exit code is 75 and nothing is started again; else it is torchrun's own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import run

from megatron_antisd.supervision.exit_codes import EXIT_PREEMPTED
from megatron_antisd.supervision.preemption import LAUNCH_FILE

DEFAULTS = {
    "--signals-to-handle": ("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
    "--shutdown-timeout": ("PET_SHUTDOWN_TIMEOUT", "120"),
}
"""Option: the environment variable by which torchrun takes it as well, and the value where the user gave none."""


def with_defaults(arguments: Sequence[str]) -> list[str]:
    """The user's arguments come later, so they win; so do torchrun's environment variables."""
    ours = [f"{option}={value}" for option, (variable, value) in DEFAULTS.items() if variable not in os.environ]
    return [*ours, *arguments]


def main(arguments: Sequence[str]) -> None:
    """Ends as torchrun does (by returning, by SystemExit or by its exception), but with SystemExit(75) where the ranks left preempted."""
    with tempfile.TemporaryDirectory(prefix="megatron_antisd_launch_") as folder:
        file = Path(folder) / "preempted"
        os.environ[LAUNCH_FILE] = str(file)
        try:
            run.main(with_defaults(arguments))
        finally:
            if file.is_file():  # the ranks agreed to stop; that torchrun sees it as a failure does not matter
                sys.exit(EXIT_PREEMPTED)


if __name__ == "__main__":
    main(sys.argv[1:])
