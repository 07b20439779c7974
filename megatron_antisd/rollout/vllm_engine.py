"""The engine protocol on vLLM, inside the trainer's processes: world / TP replicas, rank r in replica r // TP.

Order of start: the trainer's process group first, then this engine, then Megatron's CPU support.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import (
    EngineError,
    EngineFailure,
    Finished,
    Generation,
    MemoryUse,
    Quota,
    Request,
    Sampling,
    check_requests,
)
from megatron_antisd.rollout.ranks import Ranks
from megatron_antisd.rollout.spreading import GroupCount, Part, spread
from megatron_antisd.rollout.vllm_replica import VllmReplica, engine_arguments

T = TypeVar("T")


class VllmEngine:
    """vLLM under torchrun (`external_launcher`) or in a single process.

    Raises EngineError when vLLM is missing or does not start, or when the world does not divide by `rollout.tensor_parallel_size`.
    """

    policy_version: int
    replicas: int

    def __init__(
        self,
        model_path: str | Path,
        *,
        rollout: RolloutConfig,
        dtype: Literal["float32", "bfloat16"],
        seed: int = 0,
        max_context: int | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        hf_overrides: dict[str, Any] | None = None,
        policy_version: int = 0,
        timeout_seconds: float = 1800,
        routes: bool = False,
    ) -> None:
        """`max_context` None takes `rollout.max_context`, then the model's. `load_format` dummy: random weights, for a model that
        gets its first weights from `load_weights`. `timeout_seconds` bounds how long a replica waits for the slowest one, beyond the time that
        passes until an engine that stopped answering is noticed. `routes`: see Sampling.routes; for a mixture of experts alone."""
        self._owns_process_group = not dist.is_initialized()
        world = 1 if self._owns_process_group else dist.get_world_size()
        self._tensor_parallel = rollout.tensor_parallel_size
        if world % self._tensor_parallel:
            raise EngineError(f"rollout.tensor_parallel_size={self._tensor_parallel} does not divide the world of {world} ranks")
        self.replicas = world // self._tensor_parallel
        # A rank that hangs, and one that waits for it inside vLLM, come here so much later.
        patience = timedelta(seconds=timeout_seconds + 2 * rollout.stall_seconds)
        self._ranks = Ranks(patience, talkative=self._tensor_parallel > 1)
        self._failure, self._closed = "", False
        self.policy_version = policy_version
        if world > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
            raise EngineError("more than one rank but no RANK and LOCAL_RANK in the environment: start the ranks with torchrun")
        arguments = engine_arguments(
            rollout, dtype=dtype, seed=seed, max_context=max_context or rollout.max_context, load_format=load_format, hf_overrides=hf_overrides,
            executor="external_launcher" if world > 1 else "uni", routes=routes)
        self._replica = VllmReplica(model_path, arguments, stall_seconds=rollout.stall_seconds)
        try:
            self._collective("start", self._replica.start)
        except EngineError:
            self.close()
            raise

    @property
    def max_context(self) -> int:
        """Prompt and response bound in tokens."""
        return self._replica.max_context

    # -- generation

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        """See Engine.generate. With a quota a replica stops at its share (`spread`); in-process engines stop at the same decoding step every time."""
        self._ranks.require_agreement(_digest(requests, sampling, quota))
        check_requests(requests, sampling, max_context=self.max_context, vocab_size=self._replica.vocab_size)
        parts = spread(requests, self.replicas, quota)
        mine = parts[self._ranks.rank // self._tensor_parallel]
        size = 1 if quota is None else quota.group_size
        first = self._ranks.rank % self._tensor_parallel == 0

        def work() -> tuple[int, list[Generation | None] | None]:
            """With their experts responses take gigabytes: the replica's first rank alone sends them, the others that they have the same."""
            generations = self._generate(requests, mine, size, sampling, finished)
            return _digest_of(generations), generations if first else None

        done = self._collective("generate", work)
        for rank, (digest, _) in enumerate(done):
            if digest != done[rank // self._tensor_parallel * self._tensor_parallel][0]:
                self._failure = "generate: the tensor-parallel ranks of one replica drew different tokens"
                raise EngineFailure(self._failure)
        results: list[Generation | None] = [None] * len(requests)
        for part, (_, generations) in zip(parts, done[::self._tensor_parallel], strict=True):
            for index, generation in zip(part.indices, generations, strict=True):
                results[index] = generation
        return results

    def _generate(self, requests: Sequence[Request], part: Part, group_size: int, sampling: Sampling,
                  finished: Finished | None) -> list[Generation | None]:
        """This replica's part of the requests. Its tensor-parallel ranks all see each response; they report them in turns."""
        replica, done = self._replica, {}
        count = GroupCount(len(part.indices), group_size=group_size, quota=part.quota)
        with replica.decoding():
            for place, index in enumerate(part.indices if not count.met else ()):
                replica.add(str(place), requests[index], sampling)
            while replica.busy and not count.met:
                new = {int(name): generation for name, generation in replica.step().items()}
                done |= new
                count.add(new)
                if finished is not None:
                    finished([(part.indices[place], generation.response_ids) for place, generation in new.items()
                              if place % self._tensor_parallel == self._ranks.rank % self._tensor_parallel])
            if replica.busy:
                replica.stop([str(place) for place in range(len(part.indices)) if place not in done])
        return [done[place] if count.keeps(place) else None for place in range(len(part.indices))]

    # -- weights

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> list[dict[str, int]] | None:
        """See Engine.load_weights."""
        checksums = self._collective("load_weights", lambda: self._replica.load_weights(stream, check))
        self.policy_version = version
        return checksums if check else None

    # -- life cycle

    def sleep(self) -> MemoryUse | None:
        """See Engine.sleep. vLLM has no sleep mode on CPU."""
        return None if self._replica.on_cpu else self._collective("sleep", self._replica.sleep)[self._ranks.rank]

    def wake(self) -> None:
        """See Engine.wake."""
        if not self._replica.on_cpu:
            self._collective("wake", self._replica.wake)

    def take_figures(self) -> dict[str, int]:
        """See Engine.take_figures."""
        return {}

    def close(self) -> None:
        """See Engine.close."""
        if self._closed:
            return
        self._failure, self._closed = "the engine is closed", True
        try:
            self._replica.close()
        finally:
            self._destroy_groups()

    def _destroy_groups(self) -> None:
        self._ranks.close()
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()  # vLLM made it

    def _collective(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all ranks' results; see Ranks.together. After a failure the engine's state is unknown: every later
        call raises. Where one rank of a tensor-parallel replica fails alone, its partners wait inside vLLM: on CPU until their collective has
        lasted `rollout.stall_seconds`, on a GPU until somebody ends the process.
        """
        if self._failure:
            raise EngineError(f"{what}: the engine cannot go on after: {self._failure}")
        try:
            return self._ranks.together(what, action)
        except EngineError as error:
            self._failure = str(error)
            raise


def _digest(requests: Sequence[Request], sampling: Sampling, quota: Quota | None) -> int:
    return zlib.crc32(repr((sampling, quota, [(r.seed, r.prompt_ids, r.expected_tokens) for r in requests])).encode())


def _digest_of(generations: Sequence[Generation | None]) -> int:
    """Of everything in them."""
    digest = zlib.crc32(repr(generations).encode())
    for generation in generations:
        if generation is not None and generation.routes is not None:
            digest = zlib.crc32(generation.routes.data, digest)  # its repr leaves them out
    return digest
