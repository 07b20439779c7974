"""The engine servers of one node, for `rollout.mode: servers`.

    python -m megatron_antisd.serve CONFIG.yaml [key=value ...]

The same command on every node, with the trainer's configuration and secret. It starts as many servers as the node has GPUs /
`rollout.tensor_parallel_size` (one on CPU; `servers.per_node`), starts each again that breaks, and ends when all have ended.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from megatron_antisd.config import ConfigError, RunConfig, load_config, rules
from megatron_antisd.inputs import read_model_config
from megatron_antisd.rollout.servers.exit_codes import EXIT_CONFIGURATION
from megatron_antisd.rollout.servers.messages import read_token

_log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
HEALTHY_SECONDS = 600.0
"""A server that lived so long broke for a new reason: its restarts are counted anew."""


@dataclass(kw_only=True, eq=False)
class _Child:
    place: int
    process: subprocess.Popen[bytes]
    began: float
    restarts: int = 0


class Node:
    """The servers of this node."""

    def __init__(self, arguments: Sequence[str], config: RunConfig, devices: Sequence[str]) -> None:
        self._arguments, self._limit, self._devices = list(arguments), config.rollout.max_restarts, list(devices)
        self._each = config.rollout.tensor_parallel_size
        self._asked = False
        count = config.servers.per_node or max(1, len(self._devices) // self._each)
        self._children = [self._start(place) for place in range(count)]

    def run(self) -> int:
        """Until all have ended. Returns the exit code: that of the first one that broke too often, else 0."""
        code = 0
        while self._children:
            for child in list(self._children):
                ended = child.process.poll()
                if ended is None:
                    continue
                self._children.remove(child)
                restarts = 0 if time.monotonic() - child.began > HEALTHY_SECONDS else child.restarts
                if ended in (0, EXIT_CONFIGURATION) or self._asked:
                    code = code or ended
                    continue
                if restarts >= self._limit:
                    _log.error("server %d ended with code %d after %d restarts (rollout.max_restarts): given up", child.place, ended, restarts)
                    code = code or 1
                    continue
                _log.warning("server %d ended with code %d: starting it again (%d of at most %d times)", child.place, ended, restarts + 1,
                             self._limit)
                self._children.append(self._start(child.place, restarts + 1))
                if self._asked:  # meanwhile, and the new one was not told
                    self._children[-1].process.send_signal(signal.SIGTERM)
            time.sleep(POLL_SECONDS)
        return code

    def end(self, number: int, frame: FrameType | None) -> None:
        """Pass the signal on: the servers finish what is under way."""
        self._asked = True
        for child in self._children:
            child.process.send_signal(number)

    def _start(self, place: int, restarts: int = 0) -> _Child:
        # torch's store prints a page of C++ frames when the trainer ends, which is no fault.
        environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}
        if not self._devices:  # vLLM's CPU build wants a NUMA node for each engine rank, to bind it there
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if self._devices:
            mine = self._devices[place * self._each : (place + 1) * self._each]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        command = [sys.executable, "-m", "megatron_antisd.rollout.servers.process", *self._arguments]
        # A session of its own: a Ctrl-C in the terminal comes once, by `end`.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        _log.info("server %d is process %d", place, process.pid)
        return _Child(place=place, process=process, began=time.monotonic(), restarts=restarts)


def visible_devices() -> list[str]:
    """GPUs of this node that this process may use; none on CPU."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def check(config: RunConfig, devices: Sequence[str]) -> None:
    """Raises ConfigError for what no server could start with."""
    rules.check_server(config, read_model_config(config), cpu=not devices)
    read_token(config.servers)
    wanted = (config.servers.per_node or 1) * config.rollout.tensor_parallel_size
    if devices and len(devices) < wanted:
        raise ConfigError(f"servers.per_node={config.servers.per_node} x rollout.tensor_parallel_size={config.rollout.tensor_parallel_size} needs "
                          f"{wanted} GPUs, this node shows {len(devices)}")


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.exit("usage: python -m megatron_antisd.serve CONFIG.yaml [key=value ...]")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s node: %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_antisd").setLevel(logging.INFO)
    _log.setLevel(logging.INFO)
    devices = visible_devices()
    try:
        config = load_config(arguments[0], arguments[1:])
        check(config, devices)
    except ConfigError as error:
        sys.exit(f"configuration error: {error}")
    node = Node(arguments, config, devices)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, node.end)
    sys.exit(node.run())


if __name__ == "__main__":
    main(sys.argv[1:])
