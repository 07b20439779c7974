"""Weight gradients straight into Megatron's buffer, without a copy of their own.

Megatron's protocol (`LinearWithGradAccumulationAndAsyncCommunication.backward` and the hook of `DistributedDataParallel`): with the gradient
already in `main_grad`, `grad_added_to_main_grad` tells the hook not to add `.grad`, which must still be a tensor (the hook asserts it under
`overlap_grad_reduce`). A weight tied to the embedding has `zero_out_wgrad`: its `.grad` is added all the same, for the embedding's
share, so ours must be 0. Megatron leaves it uninitialised elsewhere; zeros serve both.
"""

from __future__ import annotations

import torch


def weight_gradient_buffer(weight: torch.Tensor) -> torch.Tensor:
    """Where a backward pass adds the gradient of `weight`: Megatron's buffer (fp32 as a rule) where there is one, else new zeros in fp32 or wider."""
    if _has_main_grad(weight):
        return weight.main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def finished_weight_gradient(weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """What that backward pass then returns to autograd."""
    if not _has_main_grad(weight):
        return buffer.to(weight.dtype)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total` `[m, n]` += a `[m, k]` @ b `[k, n]`, in place."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)  # spares the product of its own
    else:
        total.add_(matmul_fp32(a, b))


def matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a `[m, k]` @ b `[k, n]` -> `[m, n]` fp32. `b` carries the model's dtype, `a` that or fp32."""
    if b.is_cuda and b.dtype == torch.bfloat16:
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _has_main_grad(weight: torch.Tensor) -> bool:
    """Whether Megatron's DDP keeps this parameter's gradient in its own buffer (megatron.core.distributed sets both)."""
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")
