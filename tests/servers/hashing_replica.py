"""A replica whose tokens are hashes of what a model's would depend on: weights, prompt, seed, and what was drawn before. It decodes as vLLM does, a
token of every request a step, as many at once as it may; so what servers and dispatchers do with requests can be tested without a model."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_antisd.rollout.engine import Generation, Request, Sampling
from megatron_antisd.rollout.servers.http import build_app, serving
from megatron_antisd.rollout.servers.loop import EngineLoop
from megatron_antisd.rollout.servers.meeting import ServerRecord
from megatron_antisd.rollout.vllm_replica import SyncBroken

TOKEN = b"a secret of sixteen letters"
VOCAB = 1000
MODEL = {"model_type": "qwen3_moe", "hidden_size": 8}


def draw(version: int, request: Request, position: int, drawn: tuple[int, ...]) -> int:
    text = f"{version}/{request.seed}/{position}/{request.prompt_ids + drawn}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % VOCAB


class HashingReplica:
    max_context, vocab_size, on_cpu = 4096, VOCAB, True

    def __init__(self, *, step_seconds: float = 0.001, max_sequences: int = 8) -> None:
        self._step_seconds, self._most = step_seconds, max_sequences
        self._running: dict[str, tuple[Request, Sampling, list[int]]] = {}
        self.weights = -1
        self.names: list[str] = []
        """Of all requests that it was ever given."""
        self.prompts: list[tuple[int, ...]] = []
        self.broken: Exception | None = None

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def add(self, name: str, request: Request, sampling: Sampling) -> None:
        self.names.append(name)
        self.prompts.append(request.prompt_ids)
        self._running[name] = (request, sampling, [])

    def step(self) -> dict[str, Generation]:
        if self.broken is not None:
            raise self.broken
        time.sleep(self._step_seconds)
        done = {}
        for name in list(self._running)[: self._most]:
            request, sampling, drawn = self._running[name]
            drawn.append(draw(self.weights, request, len(drawn), tuple(drawn)))
            ended = not sampling.ignore_eos and drawn[-1] in sampling.stop_token_ids
            if ended or len(drawn) == sampling.max_new_tokens:
                done[name] = self._generation(drawn, truncated=not ended)
                del self._running[name]
        return done

    def stop(self, names: Iterable[str]) -> dict[str, Generation | None]:
        parts = {name: self._running.pop(name)[2] for name in list(names)}
        return {name: self._generation(drawn, truncated=False) if drawn else None for name, drawn in parts.items()}

    def receive_weights(self, specification: dict[str, Any]) -> list[dict[str, Any]]:
        if "breaks_off" in specification:
            raise SyncBroken("the trainer stalled", torn=specification["breaks_off"] == "late")
        if "fails" in specification:
            raise RuntimeError(specification["fails"])
        self.weights = specification["weights"]
        return [{"version": self.weights, "checksums": {}}]

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        yield

    @staticmethod
    def _generation(drawn: list[int], *, truncated: bool) -> Generation:
        return Generation(response_ids=tuple(drawn), log_probs=tuple(-token / VOCAB for token in drawn), truncated=truncated)


class RunningServer:
    """A server with such a replica, its loop in a thread of this process."""

    def __init__(self, name: str, **arguments: Any) -> None:
        self.replica = HashingReplica(**arguments)
        self.loop = EngineLoop(self.replica, name)
        self._door = serving(build_app(self.loop, TOKEN), "127.0.0.1")
        port = self._door.__enter__()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.record = ServerRecord(
            identity=name, url=f"http://127.0.0.1:{port}", tensor_parallel_size=1, expert_parallel=False, max_sequences=8, max_context=4096,
            model=MODEL, dtype="float32", routes=False)

    def _run(self) -> None:
        try:
            self.loop.run()
        except Exception as error:
            self.error = error

    def die(self) -> None:
        """As a killed process: no answer any more."""
        self._door.__exit__(None, None, None)
        self.loop.close()
        self._thread.join(5)

    def close(self) -> None:
        self.die()


@contextlib.contextmanager
def running(*names: str, **arguments: Any) -> Iterator[list[RunningServer]]:
    servers = [RunningServer(name, **arguments) for name in names]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
