"""vLLM 0.32 inside the trainer's process, with or without a GPU. Every repair states the upstream behaviour it answers.

`prepare_environment()` runs before the first `import vllm`, `install()` after it and before an engine is built. The two repairs
that concern the CPU build alone are not applied on a GPU; the ones that concern sharing a process with a trainer are.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megatron_antisd.compat import vllm_routes

SUPPORTED_VLLM = "0.32."

# What an in-process, offline engine needs. A value the user has set stands, except where the engine cannot work otherwise.
_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # the model is a directory; nothing may be fetched
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # warnings about preloaded allocators and Triton, at every start, on every rank
    # The CPU build's oneDNN keeps a compiled kernel, half a megabyte, for each number of tokens that a matrix was ever multiplied with: up to 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}
_REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # external_launcher runs the engine in this very process
# Variables vLLM's platform code rewrites for its own workers: torchrun's and every later child process's, really.
_CLOBBERED = ("LOCAL_WORLD_SIZE", "LD_PRELOAD", "OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "NUMEXPR_MAX_THREADS")

_installed = False


def prepare_environment() -> None:
    """Set what vLLM reads when it is imported. Raises RuntimeError where a variable is set to what cannot work.

    `VLLM_LOGGING_LEVEL=INFO` in the environment brings vLLM's own messages back.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name, value in _REQUIRED.items():
        if os.environ.setdefault(name, value) != value:
            raise RuntimeError(f"{name}={os.environ[name]}: the engine runs inside the trainer's process and needs "
                               f"{name}={value}; unset the variable")
    # Some modules log before vLLM reads its level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())


def install() -> None:
    """Apply the repairs, once a process.

    Raises RuntimeError on a CPU build of another vLLM version: private functions are replaced. On a GPU it warns.
    """
    global _installed
    if _installed:
        return
    import vllm
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        message = (f"the in-process engine is written for vLLM {SUPPORTED_VLLM}x, found {vllm.__version__}; "
                   "install the pinned version (tools/setup_env.sh)")
        if cpu:
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)
    _keep_default_process_group()
    _let_go_of_reloaded_layers()
    vllm_routes.install(cpu=cpu)
    if cpu:
        _prepack_experts_on_reload()
        _reduce_through_gloo()
        _leave_memory_unbound()
    _installed = True


def _keep_default_process_group() -> None:
    """Shutting an in-process engine down destroys torch's DEFAULT process group, which is the trainer's.

    Only vLLM's own groups go here; the engine that had vLLM create the default group destroys it itself.
    """
    import vllm.v1.engine.core as core

    def cleanup(shutdown_ray: bool = False) -> None:
        forget_groups()
        gc.collect()

    core.cleanup_dist_env_and_memory = cleanup


def _let_go_of_reloaded_layers() -> None:
    """A weight update puts the meta tensors that vLLM keeps of each layer, by weak reference to it, into the layer itself, with loaders that refer
    to it; the layer is then held by its own entry, and an engine that is closed keeps its weights until the process ends. Copies go in instead."""
    from vllm.model_executor.model_loader.reload import meta

    restore = meta.restore_layer_refs

    def restore_in_a_copy(tensor: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return restore(meta.to_meta_tensor(tensor), layer)

    meta.restore_layer_refs = restore_in_a_copy


def forget_groups() -> None:
    """Destroy vLLM's process groups, where there are any, so that another engine can be built in this process."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    if state is None:
        return
    state.destroy_model_parallel()
    if state._WORLD is not None:
        state._WORLD.destroy()
    state._WORLD = state._NODE_COUNT = None


def _prepack_experts_on_reload() -> None:
    """The CPU kernel reads experts in a packed layout, but `_setup_kernel` packs them on the first load only: a weight
    update copies the plain layout into the packed storage, and log-probs are wrong without any error."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    original = Method._setup_kernel

    @functools.wraps(original)
    def setup_kernel(self: Any, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        is_update = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    Method._setup_kernel = setup_kernel


def _reduce_through_gloo() -> None:
    """Tensor-parallel ranks on CPU meet in shared memory, where they wait for each other in C without end: the partners of a rank that failed
    could never be told. Besides, the file's name is, under torchrun, the same for every job (one that a crashed run leaves behind
    blocks the next start), and each engine's 4 MiB a rank stay until the process ends. Without a common name vLLM takes torch's
    collectives, which have a time-out."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def _leave_memory_unbound() -> None:
    """The CPU worker binds all later allocations of the process to the NUMA node of its first core: the same node for every
    rank, and the trainer's memory with it."""
    torch.ops._C.init_cpu_memory_env = lambda nodes: None


@contextlib.contextmanager
def engine_scope() -> Iterator[None]:
    """Run vLLM inside and give the trainer its process back as it was.

    vLLM's worker replaces `torch.set_num_threads` by a function that does nothing, seeds every global random generator (and
    on CPU draws from torch's at every decode step), and rewrites environment variables that child processes inherit. On CPU
    nothing inside is compiled: the two or three small functions vLLM compiles take 20 s and a C++ compiler to gain nothing.
    """
    import numpy as np

    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    dtype = torch.get_default_dtype()
    states = random.getstate(), np.random.get_state()
    environment = {name: os.environ.get(name) for name in _CLOBBERED}
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.current_device()] if cuda and torch.cuda.is_initialized() else []
    stance = contextlib.nullcontext() if cuda else torch.compiler.set_stance("force_eager")
    try:
        with torch.random.fork_rng(devices=devices), torch.set_grad_enabled(torch.is_grad_enabled()), stance:
            yield
    finally:
        torch.set_num_threads = set_num_threads
        set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """vLLM's start touches every attribute of torch.distributed, deprecated ones too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
