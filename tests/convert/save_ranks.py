"""Ranks that build a model from MODEL (a Hugging Face or Megatron checkpoint) on a layout and save it.

Usage: save_ranks.py MODEL OUTPUT DTYPE [parallel key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import build_config
from megatron_antisd.parallel.layout import build_layout, start_process_group


def main() -> None:
    model, output, dtype, *overrides = sys.argv[1:]
    parallel = {key: yaml.safe_load(value) for key, value in (text.split("=") for text in overrides)}
    config = build_config({"model": {"path": model, "dtype": dtype}, "data": {"train": ["none"]}, "parallel": {"timeout_seconds": 60, **parallel}})
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.checkpoint import CheckpointWriter
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=len(overrides))
    CheckpointWriter(Path(output), Trainer(config, layout, describe(model, layout.tensor_size))).save(0, {}, wait=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
