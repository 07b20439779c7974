"""An engine server that loads the first weights again at every later sync, and reports truly what it then holds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch

from megatron_antisd.rollout.servers import process


def lie() -> None:
    from megatron_antisd.rollout.transfer.worker import WeightReceiver

    load, first = WeightReceiver.load_stream, []

    def load_the_first(self: WeightReceiver, stream: Iterable[tuple[str, torch.Tensor]], names: Sequence[str] = ()) -> dict[str, int]:
        new = [(name, tensor.clone() if type(tensor) is torch.Tensor else tensor) for name, tensor in stream]
        first.extend(new if not first else ())
        return load(self, first, names)

    WeightReceiver.load_stream = load_the_first


if __name__ == "__main__":
    from megatron_antisd.compat import vllm_cpu

    vllm_cpu.prepare_environment()
    import vllm  # noqa: F401  the receiver's module repairs it

    lie()
    process.main(sys.argv[1:])
