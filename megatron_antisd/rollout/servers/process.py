"""One server: a vLLM with its door, registered with whichever trainer comes. Started by `megatron_antisd.serve`, several on a node maybe.

Ends with code 0 when it is asked to (SIGTERM) or when no trainer came for `servers.start_seconds`; with 2 for a configuration that cannot run, with
another one when the engine broke.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from types import FrameType

from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.config import ConfigError, RunConfig, load_config
from megatron_antisd.config.rollout_rules import routing_replay
from megatron_antisd.rollout.engine import EngineError
from megatron_antisd.rollout.servers.exit_codes import EXIT_CONFIGURATION
from megatron_antisd.rollout.servers.http import build_app, serving
from megatron_antisd.rollout.servers.loop import EngineLoop
from megatron_antisd.rollout.servers.meeting import Registration, ServerRecord, read_essential, split_address
from megatron_antisd.rollout.servers.messages import read_token, require_private
from megatron_antisd.rollout.vllm_replica import VllmReplica, engine_arguments

_log = logging.getLogger(__name__)


def serve(config: RunConfig, parent: int) -> None:
    """Until it is drained, has no trainer any more, or `parent` is not its parent any more. Raises ConfigError or EngineError before it is
    registered, what the engine raises later."""
    token = read_token(config.servers)
    address = config.servers.address or address_towards(*split_address(config.servers.store))
    require_private(address, "servers.address")
    replica = VllmReplica(config.model.path, _arguments(config), stall_seconds=config.rollout.stall_seconds)
    replica.start()
    identity = uuid.uuid4().hex
    loop = EngineLoop(replica, identity)
    _drain_on_signals(loop, config.servers.drain_seconds)
    with contextlib.closing(replica), serving(build_app(loop, token), address) as port:
        record = ServerRecord(
            identity=identity, url=f"http://{f'[{address}]' if ':' in address else address}:{port}", dtype=config.model.dtype,
            tensor_parallel_size=config.rollout.tensor_parallel_size, expert_parallel=config.rollout.expert_parallel,
            max_sequences=config.rollout.max_sequences, max_context=replica.max_context, model=read_essential(config.model.path),
            routes=replica.returns_routes)
        with contextlib.closing(Registration(config.servers.store, token, record, heartbeat=config.servers.heartbeat_seconds,
                                             patience=config.servers.start_seconds)) as registration:
            _end_when_alone(loop, registration, config.servers.heartbeat_seconds, parent)
            _log.info("server %s is up and looks for the trainer at %s", record.url, config.servers.store)
            loop.run()
    _log.info("server %s has ended", record.url)


def address_towards(host: str, port: int) -> str:
    """This node's address on the way to `host`. No packet is sent."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"servers.store: no way from this node to {host}:{port} ({error}); set servers.store, or servers.address") from error


def _arguments(config: RunConfig) -> dict[str, object]:
    # The first weights come from the trainer; a run that is resumed has others than the files.
    return engine_arguments(
        config.rollout, dtype=config.model.dtype, seed=config.run.seed, max_context=config.rollout.max_context, load_format="dummy",
        hf_overrides=None, routes=_wants_routes(config), executor="mp" if config.rollout.tensor_parallel_size > 1 else "uni")


def _wants_routes(config: RunConfig) -> bool:
    moe = "num_experts_per_tok" in read_essential(config.model.path)
    return routing_replay(config, moe=moe) == "engine"


def _drain_on_signals(loop: EngineLoop, seconds: float) -> None:
    def drain(number: int, frame: FrameType | None) -> None:
        _log.info("asked to end (%s): finishing what is under way", signal.Signals(number).name)
        loop.drain(seconds)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, drain)


def _end_when_alone(loop: EngineLoop, registration: Registration, heartbeat: float, parent: int) -> None:
    """Where there is no trainer for too long, or whoever started this process is gone."""

    def watch() -> None:
        while not registration.wait(heartbeat):
            if os.getppid() != parent:
                _log.warning("the process that started this server is gone: ending")
                loop.close()
                return
        if registration.lost:
            _log.warning("no trainer at servers.store for so long (servers.start_seconds): ending")
            loop.close()

    threading.Thread(target=watch, name="alone", daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    parent = os.getppid()  # before anything that takes long
    quiet_libraries()
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s server {os.getpid()}: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_antisd").setLevel(logging.INFO)
    try:
        serve(load_config(arguments[0], arguments[1:]), parent)
    except ConfigError as error:
        _log.error("%s", error)
        sys.exit(EXIT_CONFIGURATION)
    except EngineError as error:
        sys.exit(f"server: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
