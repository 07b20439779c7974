"""vLLM's workers learn to take weights from the trainer: `worker_extension_cls="megatron_antisd.rollout.transfer.worker.WeightReceiver"`.

In a server every engine rank is called with the same argument, `llm.collective_rpc("receive_weights", args=(spec,))`, while the trainer's ranks
send (`parallel.weight_sender`). Importing this module applies the repairs of vLLM's CPU build, so that spawned workers have them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_antisd.compat import vllm_cpu
from megatron_antisd.rollout.transfer.proof import LoadedProof
from megatron_antisd.wire.exchange import Script, run
from megatron_antisd.wire.instructions import Incoming, incoming_from_json
from megatron_antisd.wire.transports import Meeting, TransferError, members, open_transport

vllm_cpu.install()

EXTENSION = "megatron_antisd.rollout.transfer.worker.WeightReceiver"
_log = logging.getLogger(__name__)


class WeightReceiver:
    """Mixed into vLLM's worker, whose `model_runner`, `rank` and `device` it uses. Weights are in one of three states: whole (`version`), torn by a
    sync that broke off, or, before the first sync, those that the engine started with (version None)."""

    _received_version: int | None = None
    _torn: str | None = None
    _known_plans: dict[str, list[Incoming]] | None = None

    def receive_weights(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """One weight sync, this rank's part. `spec` is an entry of `ServerSync.specs`. Returns {"version", "checksums": {name: int}, "error"}: the
        version is None and `error` says why where the trainer did not come, or stalled. If that was before the first part was here, the old
        weights are whole and in use; after that they are torn, `weights_state` says so, and generation is refused until a later sync is
        complete. The caller empties the prefix cache before the engine goes on.

        Never raises: vLLM's multiprocess executor leaves the answers of the other ranks in its queue when one raises, and takes them for those
        of the next call."""
        try:
            checksums = self._receive(spec)
        except Exception as error:
            return {"version": None, "checksums": {}, "error": f"{type(error).__name__}: {error}"}
        self._received_version, self._torn = spec["version"], None
        vars(self).pop("execute_model", None)
        return {"version": spec["version"], "checksums": checksums, "error": None}

    def _receive(self, spec: Mapping[str, Any]) -> dict[str, int]:
        stream = self._stream(spec)
        first = next(stream)  # the old weights are touched when the first part is here, not before
        try:
            return self.load_stream(_chain(first, stream), spec["checksums"])
        except BaseException as error:
            self._tear(f"sync {spec['sync']} to version {spec['version']} broke off: {error}")
            raise

    def weights_state(self) -> dict[str, Any]:
        """{"version": of the last sync or None, "torn": why the weights are no version at all, or None}."""
        return {"version": self._received_version, "torn": self._torn}

    def load_stream(self, stream: Iterable[tuple[str, torch.Tensor]], names: Sequence[str] = ()) -> dict[str, int]:
        """Through vLLM's layer-wise reload, which redoes the packing of weights for its kernels. Returns checksums of what the model then holds of
        the tensors `names`. Where it fails the model's modules are put together again, with whatever values."""
        proof = LoadedProof(self.model_runner.model, names)
        try:
            with proof.watching():
                self.reload_weights(weights_iterator=proof.seeing(stream))
        except BaseException:
            self._put_together()
            raise
        return proof.checksums()

    def _stream(self, spec: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        host, port = spec["store"].rsplit(":", 1)
        timeout = timedelta(seconds=spec["timeout"])
        place, senders = self.rank % spec["engine_size"], spec["senders"]
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
            incoming = self._plan(store, spec["plan"], place)
        except RuntimeError as error:
            raise TransferError(f"engine rank {place} of {spec['server']}: no plan {spec['plan']} from the store at {spec['store']} within "
                                f"{spec['timeout']:g} s: {str(error).splitlines()[0]}") from error
        meeting = Meeting(store=dist.PrefixStore(f"syncs/{spec['sync']}/{spec['server']}", store), number=len(senders) + place,
                          members=members(senders, spec["server"], spec["engine_size"]), timeout=spec["timeout"], device=self.device)
        transport = open_transport(spec["transport"], meeting)
        try:
            yield from run(Script(parts=len(incoming), incoming=incoming, number_of_trainer=senders.index,
                                  number_of_engine=lambda rank: len(senders) + rank, device=self.device, timeout=spec["timeout"]), transport)
        finally:
            transport.close()

    def _plan(self, store: dist.Store, name: str, place: int) -> list[Incoming]:
        if self._known_plans is None:
            self._known_plans = {}
        if name not in self._known_plans:
            self._known_plans[name] = incoming_from_json(store.get(f"plans/{name}/{place}").decode())
        return self._known_plans[name]

    def _put_together(self) -> None:
        """vLLM remembers what a reload that broke off had loaded of a module, and the next reload would take the module for complete too early."""
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        finalize_layerwise_reload(self.model_runner.model, self.vllm_config.model_config)

    def _tear(self, why: str) -> None:
        self._torn, self._received_version = why, None

        def refuse(*arguments: Any, **options: Any) -> Any:
            raise TransferError(f"the engine's weights are no version at all, {why}; it needs a complete sync before it can generate")

        self.execute_model = refuse
        _log.error("weights are torn, and generation is refused until the next sync: %s", why)


def _chain(first: tuple[str, torch.Tensor], rest: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    yield first
    yield from rest
