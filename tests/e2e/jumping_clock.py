"""Training on machines whose clock is set again and again: `jumping_clock.py CONFIG.yaml`. Each look at the wall clock finds it a day ahead of
the last one, or a day behind."""

from __future__ import annotations

import itertools
import sys
import time

DAY = 86400.0


def main() -> None:
    from megatron_antisd.train import main as train

    wall_clock, looks = time.time, itertools.count()
    time.time = lambda: wall_clock() + DAY * (next(looks) % 2)
    train(sys.argv[1:])


if __name__ == "__main__":
    main()
