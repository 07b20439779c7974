"""The server's door: HTTP with msgpack bodies, every call with the secret, on one private address."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from megatron_antisd.rollout.engine import EngineError, EngineFailure
from megatron_antisd.rollout.servers.loop import EngineLoop, Outbox, Refused
from megatron_antisd.rollout.servers.messages import Collected, Collection, Receive, Stop, Submission, decode, encode, is_allowed

T = TypeVar("T")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def build_app(loop: EngineLoop, token: bytes) -> Starlette:
    """The calls of `client.ServerClient`. There is no other: nothing that executes code, and no documentation page."""

    async def status(request: HttpRequest) -> Response:
        return _answer(loop.status())

    async def submit(request: HttpRequest) -> Response:
        submission = decode(await request.body(), Submission)
        await _asked(loop, lambda: loop.submit(submission))
        return _answer(None)

    async def collect(request: HttpRequest) -> Response:
        message = decode(await request.body(), Collection)
        results = await _results(loop.box(message.client), message)
        return _answer(Collected(results=results, step_seconds=loop.status().step_seconds))

    async def stop(request: HttpRequest) -> Response:
        message = decode(await request.body(), Stop)
        return _answer(await _asked(loop, lambda: loop.stop(message)))

    async def receive(request: HttpRequest) -> Response:
        message = decode(await request.body(), Receive)
        return _answer(await _asked(loop, lambda: loop.receive(message)))

    calls = {"submit": submit, "collect": collect, "stop": stop, "receive": receive}
    return Starlette(routes=[Route("/status", _guarded(status, token)),
                             *(Route(f"/{name}", _guarded(call, token), methods=["POST"]) for name, call in calls.items())])


async def _asked(loop: EngineLoop, command: Callable[[], T]) -> T:
    return await asyncio.wrap_future(loop.ask(command))


async def _results(box: Outbox, message: Collection) -> tuple[Any, ...]:
    """At once where there are some, else as soon as there are, or none after the time is up."""
    ready, here = asyncio.Event(), asyncio.get_running_loop()
    box.notify = lambda: here.call_soon_threadsafe(ready.set)
    found = box.take(message.acknowledged)
    if not found:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ready.wait(), message.wait_seconds)
        found = box.take(message.acknowledged)
    return found


def _guarded(call: Handler, token: bytes) -> Handler:
    """Errors as statuses: 401 without the secret, 400 no such record, 409 or 503 not now, 422 a request that can never run, 500 broken."""

    async def guarded(request: HttpRequest) -> Response:
        if not is_allowed(request.headers.get("authorization", ""), token):
            return Response("the secret is missing or another one", status_code=401)
        try:
            return await call(request)
        except msgspec.ValidationError as error:
            return Response(str(error), status_code=400)
        except Refused as error:
            return Response(str(error), status_code=error.status)
        except EngineError as error:
            return Response(str(error), status_code=500 if isinstance(error, EngineFailure) else 422)
        except Exception as error:  # the text goes to the trainer, whose log names the server
            return Response(f"{type(error).__name__}: {error}", status_code=500)

    return guarded


def _answer(message: Any) -> Response:
    return Response(encode(message), media_type="application/msgpack")


@contextlib.contextmanager
def serving(app: Starlette, address: str) -> Iterator[int]:
    """Answers on a port of `address` that the system picks, in a thread of its own. Yields the port."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen(1024)  # from here on callers wait until the server has started
    server = uvicorn.Server(uvicorn.Config(app, log_level=logging.WARNING, access_log=False, lifespan="off", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
