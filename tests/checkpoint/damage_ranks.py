"""Ranks that look for a checkpoint after each kind of damage, on a copy, and load it; rank 0 writes what came of it.

Usage: damage_ranks.py MODEL CHECKPOINTS OUTPUT key=value ...
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from damage import CASES
from layout_ranks import configuration

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group


def main() -> None:
    model, source, output, *overrides = sys.argv[1:]
    config = configuration(model, overrides)
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.checkpoint import CheckpointError, load_checkpoint, newest_whole
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_antisd").addHandler(handler)
    layout = build_layout(config.parallel, seed=0)
    trainer = Trainer(config, layout, describe(model, layout.tensor_size))
    results = {}
    for name, (damage, _, _) in CASES.items():
        copy = Path(output).parent / name
        if layout.is_main:
            shutil.copytree(source, copy)
            damage(copy)
        dist.barrier()
        lines.clear()
        try:
            found = newest_whole(copy, layout, checksums=True)
            state = load_checkpoint(found, trainer)
            results[name] = {"found": found.name, "step": state["step"], "said": list(lines)}
        except CheckpointError as error:
            results[name] = {"found": "refused", "said": [str(error)]}
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, results[name]["found"])
        assert len(set(everyone)) == 1, everyone
    if layout.is_main:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
