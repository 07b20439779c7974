"""Weight gradients straight into Megatron's buffer, without a copy of their own.

Megatron's protocol (`LinearWithGradAccumulationAndAsyncCommunication.backward` and the hook of `DistributedDataParallel`): with the gradient
already in `main_grad`, `grad_added_to_main_grad` tells the hook not to add `.grad`, which must still be a tensor (the hook asserts it under
`overlap_grad_reduce`). Megatron hands autograd an uninitialised tensor of the weight's size for that. Here autograd gets nothing, which
still runs the hook, and `.grad` is one zero seen in the weight's shape: no memory. A weight tied to the embedding has `zero_out_wgrad`: its
`.grad` is added all the same, for the embedding's share, which autograd brings by itself.
"""

from __future__ import annotations

import torch


def weight_gradient_buffer(weight: torch.Tensor) -> torch.Tensor:
    """Where a backward pass adds the gradient of `weight`: Megatron's buffer (fp32 as a rule) where there is one, else new zeros in fp32 or wider."""
    if _has_main_grad(weight):
        return weight.main_grad
    return torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))


def finished_weight_gradient(weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor | None:
    """What that backward pass then returns to autograd; None where the gradient is in Megatron's buffer."""
    if not _has_main_grad(weight):
        return buffer.to(weight.dtype)
    weight.grad_added_to_main_grad = True
    if not getattr(weight, "zero_out_wgrad", False) and weight.grad is None:
        weight.grad = weight.new_zeros(()).expand_as(weight)
    return None


def add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`total` `[m, n]` += a `[m, k]` @ b `[k, n]`, in place. bf16 factors are multiplied in bf16 on CUDA, in fp32 elsewhere."""
    if total.dtype == a.dtype == b.dtype:
        total.addmm_(a, b)
    elif total.dtype == torch.float32 and _multiplies_bf16(a, b):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(matmul_fp32(a, b))


def matmul_fp32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a `[m, k]` @ b `[k, n]` -> `[m, n]` fp32, into `out` where given. Factors as for `add_matmul`."""
    if _multiplies_bf16(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)


def as_factor(gradient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An fp32 gradient as a factor for products with tensors of `dtype`: rounded to bf16 where those are multiplied in bf16."""
    return gradient.to(dtype) if gradient.is_cuda and dtype == torch.bfloat16 else gradient


def _multiplies_bf16(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def _has_main_grad(weight: torch.Tensor) -> bool:
    """Whether Megatron's DDP keeps this parameter's gradient in its own buffer (megatron.core.distributed sets both)."""
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")
