"""The arithmetic of the proof after a weight sync. With real engines and trainers it runs in every end-to-end test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pytest
import torch

from megatron_antisd.records import ScoringView, TokenScores
from megatron_antisd.rollout.engine import EngineError, Generation, Request, Sampling
from megatron_antisd.rollout.probe import LONGER_THAN_A_BLOCK, PROBE_TOKENS, SyncProbe, synchronise


class Scripted:
    """An engine that answers with given log-probs and notes what it is asked, in order."""

    def __init__(self, log_probs: Sequence[float]) -> None:
        self.log_probs, self.calls = tuple(log_probs), []
        self.requests: list[Request] = []
        self.sampling: Sampling | None = None
        self.policy_version, self.replicas = 0, 1

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        self.calls.append("generate")
        self.requests, self.sampling = list(requests), sampling
        return [Generation(response_ids=tuple(range(len(self.log_probs))), log_probs=self.log_probs, truncated=True) for _ in requests]

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> list[dict[str, int]] | None:
        self.calls.append(f"load {[name for name, _ in stream]}" + (f" check {list(check)}" if check else ""))
        self.policy_version = version
        return [dict.fromkeys(check, 7)] if check else None

    def wake(self) -> None:
        self.calls.append("wake")


class Given:
    """The trainer's weights: a stream, and what is wrong with the engine's checksums."""

    def __init__(self, tensors: Sequence[tuple[str, torch.Tensor]], check: Sequence[str] = (), problems: Sequence[str] = ()) -> None:
        self._tensors, self._check, self._problems = tensors, check, problems

    def stream(self) -> Iterable[tuple[str, torch.Tensor]]:
        return iter(self._tensors)

    def sample(self, version: int) -> Sequence[str]:
        return self._check

    def problems(self, names: Sequence[str], version: int, checksums: Sequence[Mapping[str, int]]) -> Sequence[str]:
        assert list(checksums) == [dict.fromkeys(names, 7)]
        return self._problems


def make_probe(trainer: Sequence[float], *, limit: float = 0.1, copies: int = 2, prompt: Sequence[int] = (4, 5, 6),
               max_context: int = 512, seen: list[ScoringView] | None = None) -> SyncProbe:
    def score(views: Sequence[ScoringView]) -> TokenScores:
        if seen is not None:
            seen.extend(views)
        values = torch.tensor(list(trainer) * len(views), dtype=torch.float32)
        return TokenScores(log_prob=values, entropy_median=0.0, lengths=(len(trainer),) * len(views))

    return SyncProbe(prompt, score=score, requests=copies, limit=limit, max_context=max_context, temperature=0.5)


def test_difference_is_mean_and_max_over_all_tokens() -> None:
    result = make_probe([-1.0, -2.0, -3.0], limit=1.0)(Scripted([-1.5, -2.0, -2.75]))
    assert result.mean == pytest.approx(0.25) and result.max == pytest.approx(0.5)


def test_signs_do_not_cancel() -> None:
    with pytest.raises(EngineError, match=r"differ from the trainer's by 5\.00e-01 on average \(max 5\.00e-01\), above the limit 1e-01"):
        make_probe([-1.0, -2.0])(Scripted([-1.5, -1.5]))


def test_at_the_limit_is_accepted_and_above_is_not() -> None:
    assert make_probe([-1.0], limit=0.25)(Scripted([-1.25])).mean == 0.25
    with pytest.raises(EngineError, match="rollout.probe_max_mean"):
        make_probe([-1.0], limit=0.25)(Scripted([-1.2500001]))


@pytest.mark.parametrize(("trainer", "engine"), [(float("nan"), -1.0), (-1.0, float("nan")), (float("-inf"), -1.0), (float("-inf"), float("-inf"))])
def test_what_is_not_finite_is_never_accepted(trainer: float, engine: float) -> None:
    with pytest.raises(EngineError, match="the engine does not hold the trainer's weights"):
        make_probe([-1.0, trainer], limit=1e9)(Scripted([-1.0, engine]))


def test_requests_reach_every_replica_and_are_longer_than_a_block() -> None:
    engine, seen = Scripted([-1.0]), []
    make_probe([-1.0], copies=3, seen=seen)(engine)
    assert len(engine.requests) == 3 and len({request.seed for request in engine.requests}) == 3
    for request, view in zip(engine.requests, seen, strict=True):
        assert request.prompt_ids == view.prompt_ids == ((4, 5, 6) * 54)[:LONGER_THAN_A_BLOCK]
        assert view.response_ids == (0,)
    assert engine.sampling == Sampling(temperature=0.5, top_p=1.0, max_new_tokens=PROBE_TOKENS, ignore_eos=True)


@pytest.mark.parametrize(("max_context", "expected"), [(512, 160), (168, 160), (100, 92), (9, 1)])
def test_prompt_leaves_room_for_the_probes_tokens(max_context: int, expected: int) -> None:
    engine = Scripted([-1.0])
    make_probe([-1.0], max_context=max_context)(engine)
    assert {len(request.prompt_ids) for request in engine.requests} == {expected}


@pytest.mark.parametrize(("prompt", "max_context"), [((), 512), ((1,), PROBE_TOKENS)])
def test_no_room_for_a_probe_is_refused(prompt: tuple[int, ...], max_context: int) -> None:
    with pytest.raises(ValueError, match="the sync probe needs a prompt and a context above 8"):
        make_probe([-1.0], prompt=prompt, max_context=max_context)


def test_synchronise_wakes_loads_and_proves_in_that_order() -> None:
    engine = Scripted([-1.0])
    result = synchronise(engine, Given([("a", torch.zeros(1)), ("b", torch.zeros(1))]), 5, make_probe([-1.0]))
    assert engine.calls == ["wake", "load ['a', 'b']", "generate"]
    assert engine.policy_version == 5 and result.max == 0.0


def test_a_failed_proof_names_the_version() -> None:
    with pytest.raises(EngineError, match="after weight sync 5 the engine's log-probs"):
        synchronise(Scripted([-3.0]), Given([]), 5, make_probe([-1.0]))


def test_checksums_are_asked_for_and_judged_before_the_probe() -> None:
    engine = Scripted([-1.0])
    synchronise(engine, Given([], check=["a"]), 5, make_probe([-1.0]))
    assert engine.calls == ["wake", "load [] check ['a']", "generate"]


def test_a_checksum_that_differs_stops_everything() -> None:
    engine = Scripted([-1.0])
    with pytest.raises(EngineError, match=r"after weight sync 5 the engine does not hold .*: p0; p1; p2; p3; p4; p5 and 2 more"):
        synchronise(engine, Given([], check=["a"], problems=[f"p{i}" for i in range(8)]), 5, make_probe([-1.0]))
    assert "generate" not in engine.calls


def test_an_engine_of_more_copies_than_requests_is_asked_on_each() -> None:
    engine = Scripted([-1.0])
    engine.replicas = 5
    make_probe([-1.0], copies=2)(engine)
    assert [request.place for request in engine.requests] == [0, 1, 2, 3, 4]
