"""What trainer and server say to each other: records, as msgpack over HTTP, and the secret that each call carries."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from megatron_antisd.config import ConfigError, ServersConfig
from megatron_antisd.rollout.engine import Generation, Request, Sampling

TOKEN_VARIABLE = "ANTISD_SERVER_TOKEN"
SHORTEST_TOKEN = 16
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request under a name that its client never used before."""

    name: str
    request: Request
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class Submission:
    client: str
    life: str
    """Of the trainer; a version number means nothing to another one."""
    version: int
    """Of the weights that must answer."""
    jobs: tuple[Job, ...]


@dataclass(frozen=True, kw_only=True)
class Collection:
    client: str
    acknowledged: int
    """Results up to this number arrived and may be forgotten."""
    wait_seconds: float
    """How long the server waits for a result where it has none."""


@dataclass(frozen=True, kw_only=True)
class Result:
    number: int
    """Counts the results for one client, from 1."""
    name: str
    generation: Generation | None
    """None: stopped before its first token."""
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Collected:
    results: tuple[Result, ...]
    step_seconds: float | None
    """Age of the decoding step under way."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Give requests up; what there is of each comes with the results."""

    client: str | None
    """None: of all clients, and nothing comes back."""
    names: tuple[str, ...] | None = None
    """None: all of the client's."""


@dataclass(frozen=True, kw_only=True)
class Receive:
    """Take new weights in."""

    life: str
    version: int
    specification: dict[str, Any]
    """What `transfer.worker` needs to know."""


@dataclass(frozen=True, kw_only=True)
class Received:
    version: int
    replies: tuple[dict[str, Any], ...]
    """Of each engine rank."""


@dataclass(frozen=True, kw_only=True)
class Status:
    identity: str
    state: str
    """`ready`, `unsynced` (has no weights of this trainer), `draining`, `failed`."""
    life: str
    version: int | None
    running: int
    steps: int
    """Decoding steps so far."""
    step_seconds: float | None
    """Age of the one under way."""
    fault: str


def encode(message: Any) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """Raises msgspec.ValidationError where the bytes are no such record."""
    return msgspec.msgpack.decode(data, type=kind)


def read_token(config: ServersConfig) -> bytes:
    """The secret of trainer and servers. Raises ConfigError where there is none, or a short one."""
    if config.token_file is not None:
        path = Path(config.token_file)
        if not path.is_file():
            raise ConfigError(f"servers.token_file: no file at {path}; make one that only you can read: "
                              f"(umask 077; head -c 32 /dev/urandom | base64 > {path})")
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"servers.token_file: {path} can be read by others (mode {path.stat().st_mode & 0o777:o}); chmod 600 {path}")
        token, where = path.read_text().strip(), f"servers.token_file {path}"
    else:
        token, where = os.environ.get(TOKEN_VARIABLE, ""), f"the variable {TOKEN_VARIABLE}"
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(f"rollout.mode=servers needs a secret of at least {SHORTEST_TOKEN} characters that trainer and servers share, got "
                          f"{len(token)} from {where}; set servers.token_file on all nodes, or the variable")
    return token.encode()


def bearer(token: bytes) -> str:
    return f"Bearer {token.decode()}"


def is_allowed(header: str, token: bytes) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(header.encode(), bearer(token).encode())


def require_private(address: str, key: str) -> None:
    """Raises ConfigError for an address that strangers may reach: whoever has the secret may replace the weights."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:
        raise ConfigError(f"{key}={address!r} is no IP address") from error
    if parsed.is_unspecified or not (parsed.is_private or parsed.is_loopback):
        raise ConfigError(f"{key}={address} can be reached from outside; servers listen on one private or loopback address (10.*, 172.16-31.*, "
                          "192.168.*, 127.*): give that of the cluster's own network")
