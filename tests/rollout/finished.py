"""What an engine reports while it decodes, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_antisd.rollout.engine import Generation, Request, Sampling


def reported(generate: Any, requests: Sequence[Request], sampling: Sampling) -> tuple[list[Generation], list[tuple[int, tuple[int, ...]]], list[int]]:
    """(generations, what `finished` was told on all ranks, how often it was called on each)."""
    mine: list[tuple[int, tuple[int, ...]]] = []
    calls: list[int] = []

    def finished(done: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        mine.extend(done)
        calls.append(len(done))

    generations = generate(requests, sampling, finished)
    everyone: list[Any] = [(mine, calls)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, calls))
    return generations, [entry for told, _ in everyone for entry in told], [len(calls) for _, calls in everyone]
