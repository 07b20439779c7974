"""Model chunks in Megatron's data-parallel wrapper: fp32 gradient buffers, reduced at a batch's end or bucket by bucket while it still runs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import MegatronModule

from megatron_antisd.config import ParallelConfig


def data_parallel_chunks(chunks: Sequence[MegatronModule], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Each of this rank's chunks wrapped. Their common TransformerConfig learns how the schedule holds a reduction back until the last
    micro-batch."""
    model_config = chunks[0].config
    # Parameters are gathered right after the optimizer's step, never during the next forward pass: the output layer's weight and the stream to
    # the engine read them outside of the modules whose hooks would wait for them.
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=parallel.distributed_optimizer, overlap_grad_reduce=parallel.overlap_gradients,
        bucket_size=parallel.gradient_bucket_parameters)
    wrapped = [DistributedDataParallel(model_config, settings, chunk) for chunk in chunks]
    if parallel.overlap_gradients:
        hold_back = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = hold_back if len(hold_back) > 1 else hold_back[0]
    return wrapped
