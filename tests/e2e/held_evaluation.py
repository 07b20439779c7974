"""Training that stops in the middle of an evaluation until it may go on: `held_evaluation.py CONFIG.yaml STEP FILE`, behind the first part of that
step's evaluation, until the file is there."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    from megatron_antisd.evaluation.store import SampleStore
    from megatron_antisd.train import main as train

    config, step, file = sys.argv[1:]
    append = SampleStore.append

    def append_and_wait(self: SampleStore, rows: Any) -> None:
        append(self, rows)
        while self.path.parent.name == f"step_{int(step):06d}" and not Path(file).exists():
            time.sleep(0.05)

    SampleStore.append = append_and_wait
    train([config])


if __name__ == "__main__":
    main()
