"""A training run whose checkpoints take turns: none, in the background, none, waited for.

Usage: checkpoint_ranks.py OUTPUT CONFIG.yaml [key=value ...]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

TURNS = ("none", "background", "none", "blocking")


def main() -> None:
    from megatron_antisd import keeping
    from megatron_antisd.metrics import MetricsWriter
    from megatron_antisd.run import Run
    from megatron_antisd.train import main as train

    output, *arguments = sys.argv[1:]
    calls: list[dict] = []

    def save(run: Run, metrics: MetricsWriter) -> None:
        mode = TURNS[run.progress.step % len(TURNS)]
        run.mark(metrics)
        run.writer.wait()  # every turn begins with an idle writer; what is left of the one before is told apart
        start = time.perf_counter()
        if mode != "none":
            run.writer.save(run.boundary.step, run.boundary.state, generators=run.boundary.generators, wait=mode == "blocking")
        calls.append({"step": run.progress.step, "mode": mode, "seconds": time.perf_counter() - start})
        if run.is_main:
            Path(output).write_text(json.dumps(calls))

    keeping.save = save
    train(arguments)


if __name__ == "__main__":
    main()
