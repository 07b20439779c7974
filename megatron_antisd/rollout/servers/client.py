"""One server, as a rank of the trainer calls it."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
import msgspec

from megatron_antisd.rollout.engine import EngineError
from megatron_antisd.rollout.servers.meeting import ServerRecord
from megatron_antisd.rollout.servers.messages import (
    Collected,
    Collection,
    Receive,
    Received,
    Status,
    Stop,
    Submission,
    bearer,
    decode,
    encode,
)

T = TypeVar("T")
BRIEF_SECONDS = 2.0


class ServerLost(RuntimeError):
    """The server does not answer, or is broken: whatever it was asked is asked of another one."""


class ServerRefused(RuntimeError):
    """The server is there and does not take this now: other weights, busy."""


class ServerDrains(ServerRefused):
    """It finishes what it has and takes nothing new."""


class ServerClient:
    """Safe to call from several threads. Each call raises ServerLost, ServerRefused, or EngineError for what no server can do."""

    def __init__(self, record: ServerRecord, token: bytes, *, silence_seconds: float, step_seconds: float) -> None:
        """`step_seconds`: what a decoding step may take, between which requests are taken and stopped."""
        self.record = record
        self._silence, self._step = silence_seconds, step_seconds
        self._http = httpx.Client(base_url=record.url, headers={"authorization": bearer(token)}, timeout=silence_seconds, trust_env=False)

    def status(self, *, briefly: bool = False) -> Status:
        """`briefly`: of one that did not answer the last time."""
        return self._call("status", None, Status, extra=BRIEF_SECONDS - self._silence if briefly else 0.0)

    def submit(self, submission: Submission) -> None:
        self._call("submit", submission, type(None), extra=self._step)

    def collect(self, message: Collection) -> Collected:
        return self._call("collect", message, Collected, extra=message.wait_seconds)

    def stop(self, message: Stop) -> int:
        return self._call("stop", message, int, extra=self._step)

    def receive(self, message: Receive, seconds: float) -> Received:
        return self._call("receive", message, Received, extra=seconds)

    def close(self) -> None:
        self._http.close()

    def _call(self, name: str, message: Any, kind: type[T], extra: float = 0.0) -> T:
        """`extra`: seconds that the answer may take beyond `servers.silence_seconds`."""
        try:
            if message is None:
                answer = self._http.get(f"/{name}", timeout=self._silence + extra)
            else:
                answer = self._http.post(f"/{name}", content=encode(message), timeout=self._silence + extra)
        except httpx.HTTPError as error:
            raise ServerLost(f"server {self.record.url}: {name}: {type(error).__name__}: {error}") from error
        if answer.status_code in (409, 503):
            raise (ServerRefused if answer.status_code == 409 else ServerDrains)(answer.text)
        if answer.status_code == 422:
            raise EngineError(answer.text)
        if answer.status_code != 200:
            raise ServerLost(f"server {self.record.url}: {name}: status {answer.status_code}: {answer.text[:500]}")
        try:
            return decode(answer.content, kind)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ServerLost(f"server {self.record.url}: {name}: an answer that cannot be read ({error}); does it run the same version?") from error
