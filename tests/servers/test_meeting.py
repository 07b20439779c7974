"""Servers and trainer find each other, and only each other."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path

import pytest
from servers.hashing_replica import MODEL, TOKEN

from megatron_antisd.config import ConfigError, RunConfig, ServersConfig
from megatron_antisd.rollout.engine import EngineError
from megatron_antisd.rollout.servers.meeting import Directory, Registration, ServerRecord, split_address, why_refused
from megatron_antisd.rollout.servers.messages import TOKEN_VARIABLE, read_token, require_private
from megatron_antisd.rollout.servers.process import address_towards

RECORD = ServerRecord(identity="a", url="http://127.0.0.1:1", tensor_parallel_size=1, expert_parallel=False, max_sequences=8, max_context=256,
                      model=MODEL, dtype="bfloat16", routes=False)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def records_within(directory: Directory, count: int, seconds: float = 10) -> list[ServerRecord]:
    end = time.monotonic() + seconds
    while len(directory.records()) < count and time.monotonic() < end:
        time.sleep(0.05)
    return directory.records()


def register(address: str, record: ServerRecord, token: bytes = TOKEN, patience: float = 30) -> Registration:
    return Registration(address, token, record, heartbeat=0.2, patience=patience)


def test_servers_wait_for_the_trainer_and_for_the_next_one() -> None:
    address = free_address()
    other = dataclasses.replace(RECORD, identity="b")
    early = register(address, RECORD)
    time.sleep(0.5)
    directory = Directory(address, TOKEN)
    late = register(address, other)
    assert sorted(record.identity for record in records_within(directory, 2)) == ["a", "b"]
    directory.forget(RECORD)
    time.sleep(0.5)
    assert directory.records() == [other]  # a server that is given up does not come back under its name
    life = directory.life
    del directory
    again = Directory(address, TOKEN)
    assert again.life != life
    assert sorted(record.identity for record in records_within(again, 2)) == ["a", "b"]
    early.close()
    late.close()
    assert not early.lost


def test_who_has_another_secret_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    address = free_address()
    directory = Directory(address, TOKEN)
    stranger, friend = register(address, RECORD, b"some other sixteen letters"), register(address, dataclasses.replace(RECORD, identity="b"))
    time.sleep(1.0)
    assert [record.identity for record in records_within(directory, 1)] == ["b"]
    assert "http://127.0.0.1:1 has another secret than this trainer" in caplog.text
    stranger.close()
    friend.close()


def test_what_is_no_record_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    address = free_address()
    directory = Directory(address, TOKEN)
    place = directory._store.add("count", 1)
    directory._store.set(f"record/{place}", "{}")
    friend = register(address, RECORD)
    assert records_within(directory, 1) == [RECORD]
    assert "entry 1 is no record of a server (KeyError" in caplog.text
    friend.close()


def test_without_a_trainer_a_server_gives_up() -> None:
    alone = register(free_address(), RECORD, patience=0.5)
    assert alone.wait(10) and alone.lost


def test_an_address_that_is_taken_is_named() -> None:
    address = free_address()
    first = Directory(address, TOKEN)
    with pytest.raises(EngineError, match=f"servers.store={address}: cannot be opened on this node"):
        Directory(address, TOKEN)
    assert first.records() == []


@pytest.mark.parametrize(("change", "why"), [
    ({"model": {**MODEL, "hidden_size": 16}}, "it has another model: hidden_size 16 there, 8 here"),
    ({"model": {"model_type": "qwen3"}}, "hidden_size None there, 8 here; model_type 'qwen3' there, 'qwen3_moe' here"),
    ({"dtype": "float32"}, "it computes in float32, this run in bfloat16"),
    ({"tensor_parallel_size": 2}, "it was started with rollout.tensor_parallel_size=2, this run with 1"),
    ({"expert_parallel": True}, "it was started with rollout.expert_parallel=True, this run with False"),
    ({"max_context": 100}, "its context is 100 tokens, this run needs 200"),
    ({}, "it returns no routes, which this run replays"),
    ({"routes": True}, ""),
])
def test_a_server_that_does_not_fit_is_refused_with_the_reason(change: dict[str, object], why: str) -> None:
    config = RunConfig.model_validate({"model": {"path": "x"}, "rollout": {"mode": "servers"}})
    said = why_refused(dataclasses.replace(RECORD, **change), config, MODEL, 200, routes=True)
    assert (why in said) if why else said == ""


def test_addresses() -> None:
    assert split_address("10.0.0.1:29610") == ("10.0.0.1", 29610)
    for wrong in ("10.0.0.1", ":1", "host:", "host:70000", "host:x"):
        with pytest.raises(ConfigError, match="HOST:PORT"):
            split_address(wrong)
    for private in ("127.0.0.1", "10.1.2.3", "192.168.0.7", "172.20.0.1", "::1", "fd00::1"):
        require_private(private, "servers.address")
    for public in ("8.8.8.8", "0.0.0.0", "::", "2001:4860:4860::8888"):
        with pytest.raises(ConfigError, match="can be reached from outside"):
            require_private(public, "servers.address")
    with pytest.raises(ConfigError, match="is no IP address"):
        require_private("localhost", "servers.address")
    assert address_towards("127.0.0.1", 29610) == "127.0.0.1"


def test_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="needs a secret of at least 16 characters .* got 0 from the variable ANTISD_SERVER_TOKEN"):
        read_token(ServersConfig())
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(ConfigError, match="got 5"):
        read_token(ServersConfig())
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN.decode())
    assert read_token(ServersConfig()) == TOKEN
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="no file at"):
        read_token(ServersConfig(token_file=str(file)))
    file.write_text("another secret of letters\n")
    os.chmod(file, 0o644)
    with pytest.raises(ConfigError, match="can be read by others .mode 644"):
        read_token(ServersConfig(token_file=str(file)))
    os.chmod(file, 0o600)
    assert read_token(ServersConfig(token_file=str(file))) == b"another secret of letters"
