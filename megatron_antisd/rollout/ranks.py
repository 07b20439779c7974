"""The ranks that use an engine together: what one of them fails in is raised on all, and what they ask must be the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_antisd.rollout.engine import EngineError, EngineFailure

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Ranks:
    """All ranks of the world, over a gloo group of their own; one rank alone where torch.distributed is not initialised. Collective."""

    def __init__(self, patience: timedelta, *, talkative: bool = False) -> None:
        """`patience` bounds the wait for the slowest rank. `talkative`: a failure is logged on its own rank at once: the others may be stuck."""
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if self.world > 1 else 0
        self._talkative = talkative
        self._group = None if self.world == 1 else dist.new_group(backend="gloo", timeout=patience)

    def together(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all ranks' results; a failure anywhere is raised everywhere: as EngineError where all that failed was
        refused (EngineError), else as EngineFailure."""
        result, error, cause, refused = None, "", None, True
        try:
            result = action()
        except Exception as exception:  # whatever it was: the other ranks wait for this one's word
            error, cause = f"{type(exception).__name__}: {exception}", exception
            refused = isinstance(exception, EngineError) and not isinstance(exception, EngineFailure)
            if self._talkative:
                _log.error("engine: %s failed on rank %d, telling the other ranks: %s", what, self.rank, error)
        reports: list[Any] = [(error, refused, result)]
        if self._group is not None:
            reports = [None] * self.world
            dist.all_gather_object(reports, (error, refused, result), group=self._group)
        failed: dict[str, list[int]] = {}
        for rank, (error, _, _) in enumerate(reports):
            if error:
                failed.setdefault(error, []).append(rank)
        if failed:
            text = f"{what} failed on " + "; ".join(f"ranks {ranks}: {error}" for error, ranks in failed.items())
            raise (EngineError if all(refused for _, refused, _ in reports) else EngineFailure)(text) from cause
        return [result for _, _, result in reports]

    def require_agreement(self, digest: int) -> None:
        """Ranks with different requests would wait for each other inside the engine. Raises EngineError before it starts."""
        if self._group is None:
            return
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(digests, torch.tensor([digest]), group=self._group)
        different = [rank for rank, other in enumerate(digests) if other.item() != digests[0].item()]
        if different:
            raise EngineError(f"ranks {different} passed other requests or sampling than rank 0; generate is collective and needs "
                              "the same full list on every rank")

    def from_main(self, value: T | None) -> T:
        """Rank 0's."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return any(self.together("vote", lambda: flag))

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
