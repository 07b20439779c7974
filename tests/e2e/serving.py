"""Engine servers for tests: real nodes with a server each, their secret and store."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from started import Started, started
from tiny_world import World

SERVE = "megatron_antisd.serve"


def server_sections(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """What a configuration needs to run on `count` servers. Everything waits briefly."""
    token = folder / "token"
    if not token.is_file():
        token.touch(mode=0o600)
        token.write_text("a secret of the tests' own")
    return {"rollout": {"mode": "servers"},
            "servers": {"store": free_address(), "count": count, "token_file": str(token), "heartbeat_seconds": 0.5, "silence_seconds": 10,
                        "start_seconds": 180}}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def nodes(world: World, config: Path, count: int, *overrides: str, module: str = SERVE) -> Iterator[list[Started]]:
    """`count` nodes, each started by its one command."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(world.root / f"{config.stem}.node{number}.log", str(config), *overrides, module=module))
               for number in range(count)]


def server_pids(node: Started) -> list[int]:
    """Of all servers that the node ever started, the last one last."""
    node.wait_for(r"server \d+ is process \d+")
    return [int(pid) for pid in re.findall(r"server \d+ is process (\d+)", node.output)]
