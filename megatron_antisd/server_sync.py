"""The trainer's weights into the engine servers: rank 0 has them receive while all ranks send; then both sides' checksums must agree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_antisd.config import RunConfig
from megatron_antisd.inputs import Inputs, read_model_config
from megatron_antisd.parallel.trainer import Trainer
from megatron_antisd.parallel.weight_sender import ReceiverSpec, WeightSender
from megatron_antisd.rollout.engine import EngineError
from megatron_antisd.rollout.ranks import Ranks
from megatron_antisd.rollout.servers.engine import ServersEngine, Tell
from megatron_antisd.rollout.servers.meeting import Directory, ServerRecord, essential, split_address
from megatron_antisd.rollout.servers.messages import read_token

Report = tuple[dict[str, Any], ...]
"""Of a server's engine ranks."""


class SendToServers:
    """Sends to whichever servers there are; the same object for the life of the process. Collective."""

    def __init__(self, config: RunConfig, sender: WeightSender, directory: Directory | None) -> None:
        self._config, self._sender = config, sender
        self._ranks = Ranks(timedelta(seconds=config.collective_seconds))
        host, port = split_address(config.servers.store)
        self._store = directory.store if directory is not None else dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=config.servers.start_seconds))
        self._numbers = itertools.count(1)

    def __call__(self, servers: Sequence[ServerRecord], version: int, tell: Tell) -> dict[str, str]:
        """Why each server failed that did, by identity. Raises EngineError where a server that took the weights holds others: it names tensors."""
        settings = self._config.sync
        receivers = [ReceiverSpec(name=server.identity, tensor_parallel_size=server.tensor_parallel_size,
                                  expert_parallel=self._config.rollout.expert_parallel) for server in servers]
        sync = self._sender.prepare(receivers, sync_id=str(next(self._numbers)), version=version, store=self._store,
                                    address=self._config.servers.store, checksum_tensors=settings.checksum_tensors)
        asked = tell(sync.specs, version, self._config.supervision.sync_seconds) if self._ranks.rank == 0 else {}
        failures = sync.send()
        reports, refused = self._ranks.together("weight sync", lambda: _replies(asked, failures, self._config.sync.timeout_seconds))[0]
        failures = {**failures, **refused}  # the server's own word, where both failed
        self._certify(servers, sync.mismatches({name: report for name, report in reports.items() if name not in failures}), version)
        return failures

    def _certify(self, servers: Sequence[ServerRecord], mismatches: Mapping[str, Sequence[str]], version: int) -> None:
        if mismatches:
            urls = {server.identity: server.url for server in servers}
            raise EngineError(f"after weight sync {version}: " + "; ".join(
                f"server {urls[name]} does not hold the trainer's weights: {', '.join(problems[:4])}" for name, problems in mismatches.items()))


def _replies(asked: Mapping[str, Future[Report]], failures: Mapping[str, str], seconds: float) -> tuple[dict[str, Report], dict[str, str]]:
    """What the servers report once everything was sent, and why others do not. One that was not sent everything is waited for no longer; another may
    still load for `seconds`."""
    wait([future for name, future in asked.items() if name not in failures], timeout=seconds)
    reports, refused = {}, {}
    for name, future in asked.items():
        if not future.done():
            refused |= {} if name in failures else {name: f"it did not report within {seconds:g} s (sync.timeout_seconds) after everything was sent"}
        elif (error := future.exception()) is not None:
            refused[name] = str(error)
        else:
            reports[name] = future.result()
    return reports, refused


def servers_builder(config: RunConfig, inputs: Inputs, trainer: Trainer, *, routes: bool) -> Callable[[], ServersEngine]:
    """What builds the engine, and builds it again after a failure: first it waits for `servers.count` servers, later for one.
    `routes`: they must return experts. Collective."""
    token = read_token(config.servers)
    opening = Ranks(timedelta(seconds=config.collective_seconds))
    opened: list[Directory] = []
    opening.together("open servers.store", lambda: opened.append(Directory(config.servers.store, token)) if trainer.layout.is_main else None)
    opening.close()
    directory = opened[0] if opened else None
    transport = "process_group" if config.sync.transport == "auto" else config.sync.transport
    sender = WeightSender(trainer.chunks, trainer.description, trainer.layout, bucket_bytes=config.rollout.sync_bucket_bytes, transport=transport,
                          timeout=config.sync.timeout_seconds)
    send = SendToServers(config, sender, directory)
    model = read_model_config(config)
    wanted = itertools.chain([config.servers.count], itertools.repeat(1))

    def build() -> ServersEngine:
        return ServersEngine(config, token, directory, model=essential(model), vocab_size=model["vocab_size"], max_context=inputs.max_context,
                             send=send, routes=routes, wanted=next(wanted))

    return build
