"""How servers and trainer find each other: a store at an address that both know, opened by rank 0 of the trainer.

A server leaves a record of itself, with a code that only who has the secret can compute, over a word that this life of the trainer made up. So
neither a stranger nor a record of an earlier run is taken for a server. When the trainer goes, servers wait for the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_antisd.config import ConfigError, RunConfig
from megatron_antisd.rollout.engine import EngineError
from megatron_antisd.rollout.servers.messages import require_private

_log = logging.getLogger(__name__)
ROOM = "megatron_antisd/servers"
POLL_SECONDS = 0.2
_UNIMPORTANT = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "architectures")
"""Of a config.json: what may differ between two copies of one model."""


@dataclass(frozen=True, kw_only=True)
class ServerRecord:
    """What a server says of itself."""

    identity: str
    """Of this process of it: a server that is started again has another one."""
    url: str
    tensor_parallel_size: int
    expert_parallel: bool
    max_sequences: int
    max_context: int
    model: dict[str, Any]
    """Its config.json, but for what does not matter."""
    dtype: str
    routes: bool
    """Whether it returns the experts of each token."""


def essential(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(model.items()) if key not in _UNIMPORTANT}


def read_essential(path: str) -> dict[str, Any]:
    return essential(json.loads((Path(path) / "config.json").read_text()))


def why_refused(record: ServerRecord, config: RunConfig, model: Mapping[str, Any], max_context: int, *, routes: bool) -> str:
    """What makes the server unfit for this run; empty where nothing does. `routes`: the run needs them."""
    different = [f"{key} {record.model.get(key)!r} there, {model.get(key)!r} here" for key in sorted({*record.model, *model})
                 if record.model.get(key) != model.get(key)]
    if different:
        return f"it has another model: {'; '.join(different[:5])}"
    if record.dtype != config.model.dtype:
        return f"it computes in {record.dtype}, this run in {config.model.dtype} (model.dtype)"
    if record.tensor_parallel_size != config.rollout.tensor_parallel_size:
        return (f"it was started with rollout.tensor_parallel_size={record.tensor_parallel_size}, this run with "
                f"{config.rollout.tensor_parallel_size}")
    if record.expert_parallel != config.rollout.expert_parallel:
        return f"it was started with rollout.expert_parallel={record.expert_parallel}, this run with {config.rollout.expert_parallel}"
    if record.max_context < max_context:
        return f"its context is {record.max_context} tokens, this run needs {max_context} (rollout.max_context)"
    if routes and not record.routes:
        return "it returns no routes, which this run replays (routing.replay); start it with the same routing keys"
    return ""


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"servers.store={text!r} is not of the form HOST:PORT, 10.0.0.1:29610 say")
    return host, int(port)


def _code(token: bytes, life: str, record: str) -> str:
    return hmac.new(token, f"{life}\n{record}".encode(), hashlib.sha256).hexdigest()


class Directory:
    """The trainer's side; of its rank 0. Raises EngineError where the address is taken, or another node's."""

    def __init__(self, address: str, token: bytes) -> None:
        host, port = split_address(address)
        self.life = uuid.uuid4().hex
        try:
            place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0]
            require_private(place, "servers.store")
            # Left to itself the store listens on all addresses.
            listener = socket.create_server((place, port), family=socket.AF_INET6 if ":" in place else socket.AF_INET, backlog=1024)
            self.store = dist.TCPStore(place, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30),
                                       master_listen_fd=listener.detach(), use_libuv=True)
        except ConfigError as error:
            raise EngineError(str(error)) from error
        except (RuntimeError, OSError) as error:
            raise EngineError(f"servers.store={address}: cannot be opened on this node ({error}); give an address of the trainer's rank 0 and a free "
                              "port, another one for each run") from error
        self._store, self._token, self._seen = dist.PrefixStore(ROOM, self.store), token, 0
        self._records: dict[str, ServerRecord] = {}
        self._store.set("life", self.life)

    def forget(self, record: ServerRecord) -> None:
        """It is gone, or unfit. When it is started again it comes as another one."""
        self._records.pop(record.identity, None)

    def records(self) -> list[ServerRecord]:
        """Of all servers that came and were not forgotten."""
        count = self._store.add("count", 0)
        for place in range(self._seen + 1, count + 1):
            try:
                self._store.wait([f"record/{place}"], timedelta(seconds=5))
                entry = json.loads(self._store.get(f"record/{place}"))
                record = ServerRecord(**json.loads(entry["record"]))
                genuine = hmac.compare_digest(entry["code"], _code(self._token, self.life, entry["record"]))
            except (dist.DistStoreError, ValueError, TypeError, KeyError) as error:
                _log.warning("servers.store: entry %d is no record of a server (%s: %s)", place, type(error).__name__, error)
                continue
            if genuine:
                self._records[record.identity] = record
            else:
                _log.warning("servers.store: %s has another secret than this trainer, or is of an earlier run; it is not used", record.url)
        self._seen = count
        return list(self._records.values())


class Registration:
    """The server's side: a thread that leaves the record with each trainer that comes, until it is closed.

    `lost` is set when there was no trainer for `patience` seconds."""

    def __init__(self, address: str, token: bytes, record: ServerRecord, *, heartbeat: float, patience: float) -> None:
        self._host, self._port = split_address(address)
        self._token, self._record, self._heartbeat, self._patience = token, json.dumps(asdict(record)), heartbeat, patience
        self.lost = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="registration", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it is over, within `seconds`: closed, or without a trainer for too long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(10)

    def _run(self) -> None:
        known, seen = "", time.monotonic()
        while not self._closed.is_set():
            store = self._connect()
            while store is not None and not self._closed.is_set():
                try:
                    life = store.get("life").decode()
                    if life != known:
                        self._leave_record(store, life)
                        known = life
                except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
                    _log.warning("the trainer's store is gone (%s); waiting for the next one", str(error).splitlines()[0])
                    break
                seen = time.monotonic()
                self._closed.wait(self._heartbeat)
            if time.monotonic() - seen > self._patience:
                self.lost = True
                return
            self._closed.wait(min(self._heartbeat, 1.0))

    def _connect(self) -> dist.Store | None:
        with contextlib.suppress(dist.DistStoreError, dist.DistNetworkError, RuntimeError, OSError):
            # torch's own attempt prints a page of C++ frames where nobody listens.
            socket.create_connection((self._host, self._port), timeout=self._heartbeat).close()
            patience = timedelta(seconds=max(1.0, self._heartbeat))
            return dist.PrefixStore(ROOM, dist.TCPStore(self._host, self._port, is_master=False, wait_for_workers=False, timeout=patience))
        return None

    def _leave_record(self, store: dist.Store, life: str) -> None:
        place = store.add("count", 1)
        store.set(f"record/{place}", json.dumps({"record": self._record, "code": _code(self._token, life, self._record)}))
        _log.info("registered with the trainer at %s:%d", self._host, self._port)
