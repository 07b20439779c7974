"""A weight stream that breaks off by itself: the engine says so, instead of calling names missing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_antisd.rollout.engine import EngineFailure
from megatron_antisd.rollout.vllm_replica import VllmReplica
from megatron_antisd.wire.transports import TransferError


def breaking() -> Iterator[tuple[str, torch.Tensor]]:
    yield "a", torch.zeros(1)
    raise TransferError("rank 1 sent nothing")


@pytest.mark.parametrize("read", [0, 2], ids=["while what is left is read", "while the engine reads"])
def test_a_stream_that_breaks_off_is_a_failure_with_its_cause(read: int) -> None:
    class Engine:
        def collective_rpc(self, method: str, args: tuple[Iterator[tuple[str, torch.Tensor]], object]) -> list[dict[str, int]]:
            for _ in range(read):
                next(args[0])
            return [{}]

    replica = VllmReplica.__new__(VllmReplica)
    replica._llm = Engine()
    with pytest.raises(EngineFailure, match="broke off after 1 tensors: TransferError: rank 1 sent nothing") as caught:
        replica.load_weights(breaking())
    assert isinstance(caught.value.__cause__, TransferError)
