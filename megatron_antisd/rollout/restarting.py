"""An engine that is built anew when it fails, and then does what it was asked as if nothing had happened."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from megatron_antisd.rollout.engine import Engine, EngineError, EngineFailure, Finished, Generation, MemoryUse, Quota, Request, Sampling

_log = logging.getLogger(__name__)
T = TypeVar("T")


class RestartingEngine:
    """The engine that `build` makes, and another one whenever it raises EngineFailure: that one gets the present weights by `restore`, and the whole
    list of requests is generated again with the same seeds. Both are collective, as every method is: a failure is raised on all ranks, so
    all ranks restart together.

    At most `max_restarts` in the life of this object; the failure after that is raised as EngineError. What a restart cannot cure
    (EngineError) is raised at once.
    """

    def __init__(self, engine: Engine, *, build: Callable[[], Engine], restore: Callable[[Engine, int], None], max_restarts: int) -> None:
        """`engine` is the first one; `restore(engine, version)` loads the weights of that policy version into a new one and proves it."""
        self._engine, self._build, self._restore, self._max_restarts = engine, build, restore, max_restarts
        self._restarts, self._counted = 0, 0
        self.asleep = False
        """Whether the engine lacks its weights: the next use of it needs `load_weights` first."""
        self.memory: MemoryUse | None = None
        """What the last `sleep` gave."""

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    @property
    def replicas(self) -> int:
        return self._engine.replicas

    def take_figures(self) -> dict[str, int]:
        """See Engine.take_figures; the same on every rank."""
        new, self._counted = self._restarts - self._counted, self._restarts
        return {"engine_restarts": new, **self._engine.take_figures()}

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        """See Engine.generate. After a restart `finished` is told of responses that it was told of before: of the same tokens, where the engine's
        arithmetic does not depend on the batch, else of others; those returned count."""
        return self.attempt(lambda engine: engine.generate(requests, sampling, finished, quota))

    def attempt(self, action: Callable[[Any], T]) -> T:
        """`action(engine)`, and again with each new engine after it raised EngineFailure. For what only some engines can do, too."""
        while True:
            try:
                return action(self._engine)
            except EngineFailure as error:
                failure = error
            self._restart(failure, self.policy_version)

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> list[dict[str, int]] | None:
        """See Engine.load_weights. After a restart the weights come from `restore`, which proves them: a stream is read once."""
        try:
            checksums = self._engine.load_weights(stream, version, **({"check": check} if check else {}))
            self.asleep = False
            return checksums
        except EngineFailure as error:
            failure = error
        self._restart(failure, version)
        return None

    def sleep(self) -> MemoryUse | None:
        """See Engine.sleep. What breaks here is found at the next `wake`."""
        self.memory = self._engine.sleep()
        self.asleep = self.memory is not None
        return self.memory

    def wake(self) -> None:
        """See Engine.wake. A new engine is awake."""
        try:
            self._engine.wake()
            return
        except EngineFailure as error:
            failure = error
        self._restart(failure, self.policy_version)

    def close(self) -> None:
        """See Engine.close."""
        self._engine.close()

    def _restart(self, failure: EngineFailure, version: int) -> None:
        while True:
            if self._restarts >= self._max_restarts:
                times = "once" if self._restarts == 0 else f"{self._restarts + 1} times"
                raise EngineError(f"the engine failed {times} in this process, and rollout.max_restarts={self._max_restarts}; "
                                  f"the last failure: {failure}") from failure
            self._restarts += 1
            _log.warning("restarting the engine (%d of at most %d times): %s", self._restarts, self._max_restarts, failure,
                         exc_info=failure.__cause__)
            _clear_frames(failure)
            _close(self._engine)
            try:
                self._engine = self._build()
                self._restore(self._engine, version)
                self.asleep = False
                return
            except EngineFailure as again:
                failure = again


def _clear_frames(error: BaseException | None) -> None:
    """The frames that a traceback holds hold the broken engine's tensors, and the new one needs their memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _close(engine: Engine) -> None:
    """A broken engine may break when it is closed, too; what it still holds is lost then."""
    try:
        engine.close()
    except Exception as error:
        _log.warning("the engine that failed could not be closed cleanly: %s: %s", type(error).__name__, error)
