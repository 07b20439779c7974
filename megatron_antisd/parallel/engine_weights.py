"""The weights as `rollout.probe.synchronise` takes them: a stream for the engine in this process, and what its checksums must be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from megatron_antisd.config import RunConfig
from megatron_antisd.models.build import PolicyModel
from megatron_antisd.models.description import ModelDescription
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.placement import EngineLayout
from megatron_antisd.parallel.weight_sender import WeightSender, compare


class EngineWeights:
    """Collective, but for `sample`. Nothing is planned before the first stream is read: engine servers and the training model's own sampler never
    read one."""

    def __init__(self, config: RunConfig, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> None:
        self._config, self._parts = config, (chunks, description, layout)
        self._engine = EngineLayout(tensor_size=config.rollout.tensor_parallel_size, expert_parallel=config.rollout.expert_parallel)
        self._built: WeightSender | None = None

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightSender.stream; empty for the training model's own sampler, which has the weights."""
        if self._config.rollout.engine == "vllm":
            yield from self._sender.stream(self._engine)

    def sample(self, version: int) -> list[str]:
        """Tensors whose checksums `synchronise` compares after this sync: none for the training model's own sampler, nor for servers, whose
        sync compares them itself."""
        rollout, count = self._config.rollout, self._config.sync.checksum_tensors
        return self._sender.sample(version, count) if rollout.engine == "vllm" and rollout.mode == "colocated" and count else []

    def problems(self, names: Sequence[str], version: int, checksums: Sequence[Mapping[str, int]]) -> list[str]:
        """What differs from the trainer's shards. `checksums`: of every rank's engine, in order."""
        if not names:
            return []
        expected, size, found = self._sender.expected(names, self._engine), self._engine.tensor_size, []
        if len(checksums) != self._parts[2].world_size:
            return [f"checksums of {len(checksums)} engine ranks, expected {self._parts[2].world_size}, one of each trainer rank"]
        for first in range(0, len(checksums), size):
            reports = [{"version": version, "checksums": sums} for sums in checksums[first : first + size]]
            found += compare(expected, reports, version, ranks=size, first_rank=first)
        return found

    @property
    def _sender(self) -> WeightSender:
        if self._built is None:
            self._built = WeightSender(*self._parts, bucket_bytes=self._config.rollout.sync_bucket_bytes, timeout=self._config.sync.timeout_seconds)
        return self._built
