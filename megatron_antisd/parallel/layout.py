"""Process groups. The one place that initialises torch.distributed and Megatron's groups; everything else gets a `ProcessLayout`."""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megatron_antisd.config import ParallelConfig
from megatron_antisd.parallel.lives import store_of_this_life


@dataclass(frozen=True, kw_only=True)
class ProcessLayout:
    """This rank's groups and places. Ranks are places inside the group of the same name."""

    world_size: int
    rank: int
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    """Ranks that share the tokens of a row."""
    data: dist.ProcessGroup
    """Ranks that hold the same weights and other rows."""
    replicas: dist.ProcessGroup
    """`data` x `context`: all ranks that hold the same weights."""
    expert_shards: dist.ProcessGroup
    """Ranks that together hold all experts of this pipeline stage: expert-parallel x expert-tensor-parallel."""
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int
    """Model chunks of each pipeline stage."""
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    replica_rank: int
    replica_size: int
    expert_rank: int
    expert_size: int
    expert_tensor_rank: int
    expert_tensor_size: int
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        """The rank that writes files and prints."""
        return self.rank == 0

    @property
    def row_multiple(self) -> int:
        """What the length of a packed row must divide by: two equal chunks for each context-parallel rank, and whole parts of what it holds
        for each tensor-parallel rank."""
        return self.tensor_size if self.context_size == 1 else self.context_size * math.lcm(2, self.tensor_size)

    def last_stage_global_rank(self) -> int:
        """Global rank of the last pipeline stage in this rank's pipeline."""
        return dist.get_global_rank(self.pipeline, self.pipeline_size - 1)


def start_process_group(timeout_seconds: int) -> None:
    """Join the world that torchrun describes; a plain `python` run is a world of one. NCCL with GPUs, gloo without.
    Must run before a vLLM engine is built, which joins the default group."""
    if dist.is_initialized():
        return
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(key, value)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_seconds)
    store = store_of_this_life(timeout)
    given = {} if store is None else {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    # gloo beside NCCL: token ids and objects travel through host memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, **given)


def build_layout(parallel: ParallelConfig, seed: int, timeout_seconds: int | None = None) -> ProcessLayout:
    """Create Megatron's groups for `parallel` and seed every rank. Needs the default process group. `timeout_seconds` stands for
    `parallel.timeout_seconds` where supervision needs a longer one."""
    from megatron.core import parallel_state as ps

    ps.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size if parallel.virtual_pipeline_size > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=-(-(timeout_seconds or parallel.timeout_seconds) // 60),
        create_gloo_process_groups=torch.cuda.is_available(),
    )
    seed_generators(seed + 1)
    return ProcessLayout(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor=ps.get_tensor_model_parallel_group(),
        pipeline=ps.get_pipeline_model_parallel_group(),
        context=ps.get_context_parallel_group(),
        data=ps.get_data_parallel_group(),
        replicas=ps.get_data_parallel_group(with_context_parallel=True),
        expert_shards=ps.get_expert_tensor_and_model_parallel_group(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=ps.get_tensor_model_parallel_world_size(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=ps.get_pipeline_model_parallel_world_size(),
        virtual_size=parallel.virtual_pipeline_size,
        context_rank=ps.get_context_parallel_rank(),
        context_size=ps.get_context_parallel_world_size(),
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
        replica_rank=ps.get_data_parallel_rank(with_context_parallel=True),
        replica_size=ps.get_data_parallel_world_size(with_context_parallel=True),
        expert_rank=ps.get_expert_model_parallel_rank(),
        expert_size=ps.get_expert_model_parallel_world_size(),
        expert_tensor_rank=ps.get_expert_tensor_parallel_rank(),
        expert_tensor_size=ps.get_expert_tensor_parallel_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
    )


def seed_generators(seed: int) -> None:
    """Start every random number generator of this rank from `seed` (below 2^31)."""
    from megatron.core import tensor_parallel

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
