"""Checkpoints of a run: whole or absent, exact on resume, and free of the layout.

    run/checkpoints/step_000012/
        manifest.json     what wrote it: layout, model, method, policy version, size and SHA-256 of every other file; written last
        state.json        the training loop's state (gate, sampler, counters), as given
        run_config.yaml   the configuration of the run that wrote it
        config.json ...   of model.path: configuration, tokenizer, generation settings; so the directory is a model.path itself
        tensors/          torch.distributed.checkpoint: the format beneath Megatron's `torch_dist`

Every tensor is stored under one global name with its true global shape, each rank writing the rectangles it holds, so any
layout reads what any other wrote: tensor-, pipeline-, expert-, data-parallel, sharded optimizer or not, padded vocabulary or not.
Megatron's own `optimizer.sharded_state_dict` is not used: with torch's AdamW it shares one `step` tensor among all parameters after
loading, which over-counts Adam's step silently, it cannot grow the expert-parallel size, and it forks writer processes.

The fp32 main weights are the weights: bf16 parameters are their rounding. Learning rate, betas and weight decay come from the
configuration of the run that loads.
"""

from megatron_antisd.checkpoint.choice import newest_whole, verify
from megatron_antisd.checkpoint.loading import load_checkpoint
from megatron_antisd.checkpoint.writer import CheckpointWriter
from megatron_antisd.parallel.checkpoint_files import CheckpointError, latest_checkpoint

__all__ = ["CheckpointError", "CheckpointWriter", "latest_checkpoint", "load_checkpoint", "newest_whole", "verify"]
