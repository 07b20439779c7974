"""Megatron-Core 0.16.1 on a machine without a GPU (gloo). Every repair states the upstream behaviour it answers.

Where CUDA is there, `install()` makes only the repairs that have nothing to do with it (`_router_gemm`, `_recomputed_norms`). Call it after
the process group and any vLLM engine exist, and before the first Megatron module is built: vLLM inspects `torch.cuda` while it starts and
must see the truth.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

SUPPORTED_MEGATRON = "0.16.1"
_CPU = torch.device("cpu")
_installed = False


class _NoStream:
    """Stands in for a CUDA stream or event: on CPU everything is already in order."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *args: Any) -> _NoStream:
        return _NoStream()


def install() -> None:
    """Apply all repairs once. Raises RuntimeError on another Megatron-Core version (private functions are replaced)."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        _router_gemm()
        _recomputed_norms()
        return
    import megatron.core

    if megatron.core.__version__ != SUPPORTED_MEGATRON:
        raise RuntimeError(f"CPU support patches private functions of megatron-core {SUPPORTED_MEGATRON}, found "
                           f"{megatron.core.__version__}; install the pinned version (tools/setup_env.sh)")
    _torch_cuda_names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _random_state()
        _router_gemm()
        _recomputed_norms()
        _expert_counts()
        _uneven_collectives()
    _installed = True


def _torch_cuda_names() -> None:
    """Megatron names `torch.cuda` for its device, streams and `.cuda()` moves without asking whether there is one."""
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, *args: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    # `with torch.device(...)` looks each factory up in a set that it makes at its first use: it must hold torch's own, which the replaced ones call.
    torch.utils._device._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like", "as_tensor"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _cuda_type_names()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`device="cuda"` written into Megatron's factories means "where the model is"."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _cuda_type_names() -> None:
    """Optimizers and gradient clipping compare `tensor.type()` with 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_


def _random_state() -> None:
    """The RNG tracker reads and writes the CUDA generator; on CPU the one generator is the CPU's."""
    import megatron.core.tensor_parallel.random as random

    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _router_gemm() -> None:
    """Without transformer-engine `te_general_gemm` is an undefined name on the router's path, with a GPU and without."""
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _recomputed_norms() -> None:
    """A checkpoint whose output is thrown away too takes `fp8=False`, its default, for a request of fp8 and asks transformer-engine, an undefined
    name without that package."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__
    if hasattr(original, "__wrapped__"):
        return  # repaired already

    @functools.wraps(original)
    def init(self: CheckpointWithoutOutput, fp8: bool = False) -> None:
        original(self, fp8)
        self.fp8 = bool(fp8)

    CheckpointWithoutOutput.__init__ = init


def _expert_counts() -> None:
    """The dispatcher's move-to-host converts to numpy only when the tensor was on a GPU."""
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_host


def _uneven_collectives() -> None:
    """gloo gathers equal sizes only; expert-tensor-parallel dispatch (EP and ETP > 1) needs unequal ones: pad to the largest."""
    import megatron.core.tensor_parallel.mappings as mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(x: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        widest = max(output_split_sizes)
        padded = x.new_zeros((widest, *x.shape[1:]))
        padded[: x.shape[0]] = x
        out = x.new_empty((widest * group.size(), *x.shape[1:]))
        dist.all_gather_into_tensor(out, padded, group=group)
        return torch.cat([out[i * widest : i * widest + n] for i, n in enumerate(output_split_sizes)])

    def scatter(x: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return torch.split(total, list(input_split_sizes))[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter
