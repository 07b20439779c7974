"""A rank's requests over several servers: nothing is lost or drawn twice, whatever happens to the servers and however often weights change."""

from __future__ import annotations

import contextlib
import queue
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from servers.hashing_replica import TOKEN, RunningServer, draw, running

from megatron_antisd.rollout.engine import EngineError, EngineFailure, Request, Sampling
from megatron_antisd.rollout.servers.batch import Batch, Response, Spans, continued_seed, make_batch
from megatron_antisd.rollout.servers.client import ServerClient
from megatron_antisd.rollout.servers.dispatcher import Dispatcher
from megatron_antisd.rollout.servers.messages import Receive

PATIENCE = 20


def sampling(tokens: int, stop: tuple[int, ...] = ()) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, max_new_tokens=tokens, ignore_eos=not stop, stop_token_ids=stop)


def requests(groups: int, size: int = 4) -> dict[int, Request]:
    """Groups with one prompt each, longer than what is looked at."""
    return {size * group + i: Request(prompt_ids=(group,) * 70, seed=100 * group + i) for group in range(groups) for i in range(size)}


def client_of(server: RunningServer) -> ServerClient:
    return ServerClient(server.record, TOKEN, silence_seconds=3, step_seconds=2)


@contextlib.contextmanager
def dispatcher(servers: Sequence[RunningServer], room: int = 8, request_seconds: float = 60, stall_seconds: float = 20) -> Iterator[Dispatcher]:
    clients = [client_of(server) for server in servers]
    one = Dispatcher("me", "life", request_seconds=request_seconds, stall_seconds=stall_seconds)
    give(clients, 0)
    one.use([(client, room) for client in clients])
    one.resume(0, urgent_only=False)
    try:
        yield one
    finally:
        one.close()


def give(clients: Sequence[ServerClient], version: int) -> None:
    for client in clients:
        client.receive(Receive(life="life", version=version, specification={"weights": version}), 5)


def new_weights(one: Dispatcher, servers: Sequence[RunningServer], version: int, **how: bool) -> None:
    one.pause(wait=how.get("wait", False), seconds=5)
    clients = [client_of(server) for server in servers]
    give(clients, version)
    one.use([(link.client, link.room) for link in one._links.values()])
    one.resume(version, urgent_only=False)


def wait_for(batch: Batch) -> dict[int, Response]:
    done: dict[int, Response] = {}
    end = time.monotonic() + PATIENCE
    while len(done) < len(batch.responses):
        assert time.monotonic() < end, f"{len(done)} of {len(batch.responses)} after {PATIENCE} s"
        try:
            event = batch.events.get(timeout=0.1)
        except queue.Empty:
            continue
        if isinstance(event, EngineError):
            raise event
        assert event.index not in done
        done[event.index] = event
    return done


def expected(request: Request, given: Sampling, spans: Spans) -> tuple[int, ...]:
    """The tokens of a response whose stretches were drawn by these versions."""
    ids: tuple[int, ...] = ()
    for version, tokens in spans:
        stretch, part = Request(prompt_ids=request.prompt_ids + ids, seed=continued_seed(request.seed, len(ids))), ()
        for position in range(tokens):
            part += (draw(version, stretch, position, part),)
        ids += part
    return ids


def check(done: dict[int, Response], asked: dict[int, Request], given: Sampling) -> None:
    for index, response in done.items():
        generation = response.generation()
        assert generation.response_ids == expected(asked[index], given, generation.version_spans)
        assert len(generation.log_probs) == len(generation.response_ids) == sum(tokens for _, tokens in generation.version_spans)
        ended = generation.response_ids[-1] in given.stop_token_ids and not given.ignore_eos
        assert generation.truncated == (not ended) and (ended or len(generation.response_ids) == given.max_new_tokens)


def test_every_request_is_answered_once_and_groups_share_a_server() -> None:
    with running("a", "b") as servers, dispatcher(servers, room=32) as one:
        asked = requests(8)
        batch = make_batch(asked, sampling(20))
        one.submit(batch)
        check(wait_for(batch), asked, sampling(20))
        assert [len(server.replica.names) for server in servers] == [16, 16]
        prompts = [set(server.replica.prompts) for server in servers]
        assert len(prompts[0]) + len(prompts[1]) <= 9  # at most one group is divided
        assert one.take_moved() == 0 and one.lost() == set()


def test_responses_end_where_they_end() -> None:
    with running("a", "b") as servers, dispatcher(servers) as one:
        asked, given = requests(10), sampling(200, stop=tuple(range(0, 1000, 20)))
        batch = make_batch(asked, given)
        one.submit(batch)
        done = wait_for(batch)
        check(done, asked, given)
        assert any(not response.generation().truncated for response in done.values())


def test_a_slow_server_gets_less() -> None:
    with running("fast", max_sequences=4) as (fast,), running("slow", step_seconds=0.02, max_sequences=4) as (slow,), \
            dispatcher([fast, slow], room=4) as one:
        asked = requests(16)
        batch = make_batch(asked, sampling(30))
        one.submit(batch)
        check(wait_for(batch), asked, sampling(30))
        assert len(slow.replica.names) < len(fast.replica.names) / 2


def test_a_server_that_dies_leaves_its_requests_to_the_others() -> None:
    with running("a", "b", step_seconds=0.005) as servers, dispatcher(servers, room=32) as one:
        asked = requests(8)
        batch = make_batch(asked, sampling(60))
        one.submit(batch)
        while servers[0].loop.status().steps < 5:
            time.sleep(0.01)
        servers[0].die()
        check(wait_for(batch), asked, sampling(60))
        assert one.lost() == {"a"} and one.take_moved() == 16
        assert len(servers[1].replica.names) == 32


def test_when_none_is_left_it_is_said() -> None:
    with running("a", step_seconds=0.005) as (server,), dispatcher([server]) as one:
        batch = make_batch(requests(1), sampling(2000))
        one.submit(batch)
        while server.loop.status().steps < 5:
            time.sleep(0.01)
        server.die()
        with pytest.raises(EngineFailure, match="no server is left; the last word: server http://127.0.0.1"):
            wait_for(batch)
        late = make_batch(requests(1), sampling(5))
        one.submit(late)
        with pytest.raises(EngineFailure, match="no server is left"):
            wait_for(late)


def test_a_request_that_takes_too_long_is_moved() -> None:
    with running("slow", step_seconds=0.2) as (slow,), running("fast") as (fast,), dispatcher([slow, fast], request_seconds=1.0) as one:
        asked = requests(4)
        batch = make_batch(asked, sampling(40))  # 8 s on the slow one
        one.submit(batch)
        check(wait_for(batch), asked, sampling(40))
        assert one.lost() == {"slow"}


def test_what_no_server_can_do_is_raised() -> None:
    with running("a") as servers, dispatcher(servers) as one:
        batch = make_batch({0: Request(prompt_ids=(1,) * 4000, seed=0)}, sampling(200))
        one.submit(batch)
        with pytest.raises(EngineError, match="exceeds the context") as caught:
            wait_for(batch)
        assert not isinstance(caught.value, EngineFailure)


def test_responses_go_on_with_new_weights_where_they_were_stopped() -> None:
    with running("a", "b", step_seconds=0.003) as servers, dispatcher(servers, room=6) as one:
        asked = requests(6)
        batch = make_batch(asked, sampling(100))
        one.submit(batch)
        for version in (1, 2, 3):
            time.sleep(0.1)
            new_weights(one, servers, version)
        done = wait_for(batch)
        check(done, asked, sampling(100))
        versions = Counter(len(response.spans) for response in done.values())
        assert max(versions) > 1  # some were cut
        assert all([v for v, _ in response.spans] == sorted({v for v, _ in response.spans}) for response in done.values())


def test_a_replay_cuts_every_response_where_it_was_cut() -> None:
    with running("a", "b", step_seconds=0.003) as servers, dispatcher(servers, room=6) as one:
        asked = requests(6)
        batch = make_batch(asked, sampling(100))
        one.submit(batch)
        for version in (1, 2):
            time.sleep(0.1)
            new_weights(one, servers, version)
        done = wait_for(batch)
    cuts = [done[index].spans for index in asked]
    with running("c") as servers, dispatcher(servers, room=30) as one:  # faster, and one alone
        again = make_batch(asked, sampling(100), cuts)
        one.submit(again)
        for version in (1, 2):
            one.run_out()
            new_weights(one, servers, version)
        replayed = wait_for(again)
    assert {index: response.generation() for index, response in replayed.items()} == {i: response.generation() for i, response in done.items()}


def test_waiting_for_what_is_under_way_cuts_nothing() -> None:
    with running("a", step_seconds=0.003) as servers, dispatcher(servers, room=4) as one:
        asked = requests(3)
        batch = make_batch(asked, sampling(60))
        one.submit(batch)
        time.sleep(0.1)
        new_weights(one, servers, 1, wait=True)
        done = wait_for(batch)
        check(done, asked, sampling(60))
        assert Counter(response.spans for response in done.values()) == {((0, 60),): 4, ((1, 60),): 8}


def test_what_somebody_waits_for_goes_before_what_is_drawn_ahead() -> None:
    with running("a", step_seconds=0.003) as servers, dispatcher(servers, room=4) as one:
        one.resume(0, urgent_only=True)
        ahead, now = make_batch(requests(4), sampling(50), urgent=False), make_batch(requests(1), sampling(10))
        one.submit(ahead)
        time.sleep(0.6)
        assert servers[0].replica.names == []  # the weights are not proved yet
        one.submit(now)
        wait_for(now)
        assert ahead.events.empty()
        one.resume(0, urgent_only=False)
        wait_for(ahead)


def test_a_batch_that_is_withdrawn_takes_no_more_time() -> None:
    with running("a", step_seconds=0.003) as servers, dispatcher(servers, room=8) as one:
        given_up, next_one = make_batch(requests(4), sampling(3000)), make_batch(requests(1), sampling(10))
        one.submit(given_up)
        time.sleep(0.2)
        one.withdraw(given_up)
        one.submit(next_one)
        wait_for(next_one)
        assert servers[0].loop.status().running == 0 and given_up.events.empty()


def test_a_request_for_every_copy_reaches_every_server() -> None:
    with running("a", "b", "c") as servers, dispatcher(servers) as one:
        asked = {index: Request(prompt_ids=(7,) * 70, seed=index, place=index) for index in range(3)}
        batch = make_batch(asked, sampling(5))
        one.submit(batch)
        wait_for(batch)
        assert [len(server.replica.names) for server in servers] == [1, 1, 1]


def test_a_server_with_other_weights_is_not_used() -> None:
    with running("a", "b") as servers, dispatcher(servers) as one:
        give([client_of(servers[0])], 7)
        asked = requests(2)
        batch = make_batch(asked, sampling(5))
        one.submit(batch)
        check(wait_for(batch), asked, sampling(5))
        assert one.lost() == {"a"} and servers[0].replica.names == []


def test_a_dispatcher_that_comes_after_another_gets_none_of_its_results() -> None:
    """An engine that is built anew on the same rank: what the server still keeps for the old one must not answer the new one's requests."""
    with running("a") as servers:
        asked = requests(2)
        for seed in (0, 1000):
            mine = {index: Request(prompt_ids=request.prompt_ids, seed=request.seed + seed) for index, request in asked.items()}
            with dispatcher(servers) as one:
                batch = make_batch(mine, sampling(10))
                one.submit(batch)
                check(wait_for(batch), mine, sampling(10))


def test_a_server_that_drains_keeps_what_it_has_and_others_take_the_rest() -> None:
    with running("a", "b", step_seconds=0.01) as servers, dispatcher(servers, room=4) as one:
        asked = requests(5)
        batch = make_batch(asked, sampling(60))
        one.submit(batch)
        while servers[0].loop.status().steps < 5:
            time.sleep(0.01)
        servers[0].loop.drain(20)
        check(wait_for(batch), asked, sampling(60))
        assert one.take_moved() == 0 and len(servers[0].replica.names) == 4 and len(servers[1].replica.names) == 16


def test_a_decoding_step_that_does_not_end_is_noticed() -> None:
    with running("stuck", step_seconds=4) as (stuck,), running("well") as (well,), dispatcher([stuck, well], stall_seconds=1) as one:
        asked = requests(4)
        batch = make_batch(asked, sampling(20))
        one.submit(batch)
        check(wait_for(batch), asked, sampling(20))
        assert one.lost() == {"stuck"}


def test_what_is_drawn_ahead_waits_for_a_server() -> None:
    with running("a", step_seconds=0.005) as (first,), running("b") as (second,), dispatcher([first]) as one:
        asked = requests(1)
        ahead = make_batch(asked, sampling(200), urgent=False)
        one.submit(ahead)
        while first.loop.status().steps < 5:
            time.sleep(0.01)
        first.die()
        while not one.lost():
            time.sleep(0.05)
        assert ahead.events.empty()
        one.pause(wait=False, seconds=5)
        give([client_of(second)], 1)
        one.use([(client_of(second), 8)])
        one.resume(1, urgent_only=False)
        check(wait_for(ahead), asked, sampling(200))


def test_a_replay_that_cannot_come_to_its_end_says_so() -> None:
    with running("a") as servers, dispatcher(servers) as one:
        one.pause(wait=False, seconds=5)
        give([client_of(servers[0])], 5)
        one.use([(client_of(servers[0]), 8)])
        one.resume(5, urgent_only=False)
        for cuts in (((4, 3), (5, 7)), ((5, 7),)):  # of weights that are gone; of a response that was complete after 7 tokens
            batch = make_batch({0: Request(prompt_ids=(1,), seed=1)}, sampling(10), [cuts])
            one.submit(batch)
            one.resume(5, urgent_only=False)
            with pytest.raises(EngineError, match="cannot be drawn as they were"):
                wait_for(batch)
