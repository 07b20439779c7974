"""AdamW whose moments lie in host memory between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """torch's AdamW, bit for bit, with 8 bytes a parameter less on the GPU: a step brings a parameter's moments there, updates, and takes them
    back to pinned host memory, one parameter after another. That moves 16 bytes a parameter over the bus.

    Megatron's own offloading updates on the CPU, cannot run without a GPU, and keeps its state where this project's checkpoints do not look.
    """

    def __init__(self, params: Any, *, adam_w_mode: bool = True, **options: Any) -> None:
        # Megatron passes `adam_w_mode` to every AdamW but the class torch.optim.AdamW itself.
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False asks for Adam's coupled weight decay; this is AdamW")
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of every parameter that has a gradient. Raises ValueError for a closure: its gradients could not be clipped."""
        if closure is not None:
            raise ValueError("OffloadedAdamW.step takes no closure; compute the gradients before it")
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_alone(group, parameter)
        finally:
            self.param_groups = groups
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # a checkpoint reads the host's side

    def _step_alone(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        host = {key: state[key] for key in MOMENTS if key in state}
        state.update({key: moment.to(parameter.device, non_blocking=True, copy=True) for key, moment in host.items()})
        self.param_groups = [{**group, "params": [parameter]}]
        super().step()
        state.update({key: host[key].copy_(state[key], non_blocking=True) if key in host else on_host(state[key]) for key in MOMENTS})


def on_host(moment: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, pinned where `moment` comes from a GPU; complete once the current stream has come to it."""
    copy = torch.empty(moment.shape, dtype=moment.dtype, pin_memory=moment.is_cuda)
    return copy.copy_(moment, non_blocking=True)
