"""One server's door and loop: who may call, what is refused, and that no result is lost or given to another client."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from servers.hashing_replica import TOKEN, RunningServer, draw, running

from megatron_antisd.rollout.engine import EngineError, Request, Sampling
from megatron_antisd.rollout.servers.client import ServerClient, ServerDrains, ServerLost, ServerRefused
from megatron_antisd.rollout.servers.messages import Collection, Job, Receive, Result, Stop, Submission, bearer

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=5, ignore_eos=True)
LONG = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=3000, ignore_eos=True)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running("a") as (one,):
        yield one


def client_of(server: RunningServer) -> ServerClient:
    return ServerClient(server.record, TOKEN, silence_seconds=5, step_seconds=1)


def job(name: str, seed: int = 1, sampling: Sampling = SAMPLING) -> Job:
    return Job(name=name, request=Request(prompt_ids=(1, 2, 3), seed=seed), sampling=sampling)


def submission(*jobs: Job, client: str = "me", life: str = "x", version: int = 3) -> Submission:
    return Submission(client=client, life=life, version=version, jobs=jobs)


def give_weights(client: ServerClient, version: int = 3) -> None:
    client.receive(Receive(life="x", version=version, specification={"weights": version}), 5)


def collect(client: ServerClient, count: int, name: str = "me", acknowledged: int = 0) -> list[Result]:
    found: list[Result] = []
    end = time.monotonic() + 5
    while len(found) < count and time.monotonic() < end:
        found = list(client.collect(Collection(client=name, acknowledged=acknowledged, wait_seconds=0.2)).results)
    assert len(found) == count
    return found


def test_without_the_secret_every_call_is_refused_and_there_are_no_others(server: RunningServer) -> None:
    http = httpx.Client()
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN.decode()}, {"authorization": "bearer " + TOKEN.decode()}):
        assert http.get(f"{server.record.url}/status", headers=header).status_code == 401
        for call in ("submit", "collect", "stop", "receive"):
            assert http.post(f"{server.record.url}/{call}", headers=header, content=b"").status_code == 401
    assert server.loop.status().state == "unsynced"  # nothing happened
    for path in ("/docs", "/openapi.json", "/collective_rpc", "/pause", "/v1/completions", "/"):
        assert http.post(server.record.url + path, headers={"authorization": bearer(TOKEN)}).status_code in (404, 405), path


def test_what_is_no_record_is_refused(server: RunningServer) -> None:
    answer = httpx.post(f"{server.record.url}/submit", headers={"authorization": bearer(TOKEN)}, content=b"\x81\xa6client\x01")
    assert answer.status_code == 400
    assert "client" in answer.text


def test_without_weights_or_with_others_nothing_is_drawn(server: RunningServer) -> None:
    client = client_of(server)
    with pytest.raises(ServerRefused, match="server a is unsynced"):
        client.submit(submission(job("j")))
    give_weights(client)
    with pytest.raises(ServerRefused, match="holds version 3 of the weights, asked for 4"):
        client.submit(submission(job("j"), version=4))
    with pytest.raises(ServerRefused, match="of another trainer"):
        client.submit(submission(job("j"), life="y"))
    assert server.replica.names == []


def test_a_request_that_can_never_run_says_so(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    with pytest.raises(EngineError, match="exceeds the context of 4096"):
        client.submit(submission(job("ok"), Job(name="j", request=Request(prompt_ids=(1,) * 4095, seed=0), sampling=SAMPLING)))
    assert server.replica.names == []  # not the others either


def test_results_come_until_they_are_acknowledged(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    client.submit(submission(job("one", 1), job("two", 2)))
    client.submit(submission(job("theirs", 1), client="you"))
    first = collect(client, 2)
    assert [result.name for result in first] == ["one", "two"]
    assert collect(client, 2) == first  # the answer may have been lost on the way
    assert collect(client, 1, acknowledged=1) == first[1:]
    assert client.collect(Collection(client="me", acknowledged=2, wait_seconds=0.01)).results == ()
    (other,) = collect(client, 1, name="you")
    assert other.generation == first[0].generation
    request, drawn = Request(prompt_ids=(1, 2, 3), seed=1), ()
    for position in range(5):
        drawn += (draw(3, request, position, drawn),)
    assert other.generation is not None and other.generation.response_ids == drawn and other.generation.truncated


def test_stopped_requests_give_what_there_is(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    client.submit(submission(job("a", 1, LONG), job("b", 2, LONG), job("c", 3, LONG)))
    client.submit(submission(job("theirs", 1, LONG), client="you"))
    while client.status().steps < 3:
        time.sleep(0.01)
    assert client.stop(Stop(client="me", names=("b",))) == 1
    (part,) = collect(client, 1)
    assert part.stopped and part.name == "b" and part.generation is not None and 3 <= len(part.generation.response_ids) < 3000
    assert client.status().running == 3
    with pytest.raises(ServerRefused, match="3 requests under way; stop them before new weights"):
        give_weights(client, 4)
    assert client.status().version == 3
    assert client.stop(Stop(client="me")) == 2
    assert client.stop(Stop(client=None)) == 1  # nobody waits for those
    assert client.collect(Collection(client="you", acknowledged=0, wait_seconds=0.01)).results == ()
    give_weights(client, 4)
    assert client.status().version == 4


def test_a_transfer_that_breaks_off_leaves_the_old_weights_or_none(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    with pytest.raises(ServerRefused, match="the trainer stalled"):
        client.receive(Receive(life="x", version=4, specification={"breaks_off": "early"}), 5)
    client.submit(submission(job("old", 1), version=3))
    collect(client, 1)
    with pytest.raises(ServerRefused, match="the trainer stalled"):
        client.receive(Receive(life="x", version=4, specification={"breaks_off": "late"}), 5)
    for version in (3, 4):
        with pytest.raises(ServerRefused, match="server a is unsynced"):
            client.submit(submission(job("new", 1), version=version))
    give_weights(client, 4)
    assert client.status().state == "ready"


def test_weights_that_break_the_engine_end_the_server(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    with pytest.raises(ServerLost, match="status 500.*torn in the middle"):
        client.receive(Receive(life="x", version=4, specification={"fails": "torn in the middle"}), 5)
    with pytest.raises((ServerRefused, ServerLost)):
        client.submit(submission(job("j"), version=3))  # the old ones are not whole any more
    assert server.replica.names == []


def test_a_broken_engine_is_told_to_whoever_asks(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    server.replica.broken = RuntimeError("a kernel failed")
    client.submit(submission(job("j")))
    end = time.monotonic() + 5
    while client.status().state != "failed" and time.monotonic() < end:
        time.sleep(0.01)
    assert client.status().fault == "RuntimeError: a kernel failed"
    with pytest.raises(ServerRefused, match="a kernel failed"):
        client.submit(submission(job("k")))
    assert str(server.error) == "a kernel failed"  # the process ends by it


def test_a_draining_server_finishes_and_takes_nothing_new(server: RunningServer) -> None:
    client = client_of(server)
    give_weights(client)
    client.submit(submission(job("j", 1, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=100, ignore_eos=True))))
    server.loop.drain(20)
    with pytest.raises(ServerDrains, match="draining"):
        client.submit(submission(job("k")))
    (result,) = collect(client, 1)
    assert result.generation is not None and len(result.generation.response_ids) == 100
    server._thread.join(10)
    assert not server._thread.is_alive() and server.error is None
