"""What a run does about experts, with a scorer and an engine of wood: which views get which routes, what is measured, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch

from megatron_antisd.batch import student_views
from megatron_antisd.config import RunConfig, build_config
from megatron_antisd.config.rollout_rules import rollout_problems, routing_replay
from megatron_antisd.records import PrivilegedView, Problem, Rollout, RolloutGroup, ScoringView, StepStats, TokenScores
from megatron_antisd.rollout.engine import Generation, Request, Sampling
from megatron_antisd.routing import MissingRoutes, RoutingReplay
from megatron_antisd.token_routes import TokenRoutes

LENGTHS = (3, 1, 4, 2)


def configuration(**sections: dict[str, Any]) -> RunConfig:
    raw = {"model": {"path": "none", "dtype": "bfloat16"}, "data": {"train": ["none"]}}
    return build_config({**raw, **sections, "model": {**raw["model"], **sections.get("model", {})}})


def routes(tokens: int, seed: int) -> TokenRoutes:
    return TokenRoutes.of(numpy.random.default_rng(seed).integers(0, 8, (tokens, 2, 2)))


def groups(*, routed: bool = True) -> list[RolloutGroup]:
    """Two of two rollouts, prompts of two tokens, engine log-probs of -1."""
    rollouts = [Rollout(problem_id=str(i // 2), index=i % 2, prompt_ids=(1, 2), response_ids=tuple(range(10, 10 + n)), engine_log_probs=(-1.0,) * n,
                        truncated=False, policy_version=0, routes=routes(n + 1, seed=i) if routed else None) for i, n in enumerate(LENGTHS)]
    return [RolloutGroup(problem=Problem(id=str(i), prompt="?", answer="1"), rollouts=tuple(rollouts[2 * i : 2 * i + 2])) for i in range(2)]


class Scorer:
    """Gives -1.5 where experts are its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[ScoringView], bool]] = []

    def __call__(self, views: Sequence[ScoringView], *, record_routes: bool = False) -> TokenScores:
        self.asked.append((views, record_routes))
        lengths = tuple(len(v.response_ids) for v in views)
        recorded = tuple(routes(n + 1, seed=100 + i) for i, n in enumerate(lengths)) if record_routes else None
        return TokenScores(log_prob=torch.full((sum(lengths),), -1.5), entropy_median=1.0, lengths=lengths, routes=recorded)


def stats(equal: tuple[float, ...] | None) -> StepStats:
    scores = TokenScores(log_prob=torch.zeros(0), entropy_median=None, lengths=())
    return StepStats(loss=0.0, grad_norm=0.0, clip_fraction=0.0, student_entropy_mean=0.0, mismatch_kl=0.0, mismatch_mean=0.0, mismatch_max=0.0,
                     skipped=False, padding_share=0.0, student=scores, routes_equal=equal)


def test_the_engines_routes_reach_the_update_and_a_sample_is_scored_without() -> None:
    routing = RoutingReplay(config=configuration(routing={"sample_every": 2, "sample_rollouts": 2}), replay="engine")
    given, score = groups(), Scorer()
    assert routing.prepare(given, 1, score, 0) == tuple(given)
    assert [view.routes.tokens for view in student_views(given)] == [n + 1 for n in LENGTHS]
    (views, recorded), = score.asked
    assert [view.response_ids for view in views] == [given[0].rollouts[0].response_ids, given[1].rollouts[0].response_ids], "spread over the batch"
    assert all(view.routes is None for view in views) and not recorded
    student = torch.full((sum(LENGTHS),), -1.1)
    found = routing.figures([stats((0.5, 1.0))], student)
    assert found == pytest.approx({"routes_equal_share": 0.75, "routes_equal_share_min": 0.5, "mismatch_free_mean": 0.5, "mismatch_free_max": 0.5,
                                   "mismatch_free_outside": 1.0, "mismatch_replayed_mean": 0.1, "mismatch_replayed_max": 0.1,
                                   "mismatch_replayed_outside": 0.0})
    assert routing.prepare(given, 2, score, 0) == tuple(given) and len(score.asked) == 1, "not every step"
    assert routing.figures([stats(None)], student)["mismatch_free_mean"] is None
    assert routing.figures([], None)["routes_equal_share"] is None and routing.layers([]) == []


def test_the_sample_of_batches_drawn_ahead_is_of_the_present_weights() -> None:
    config = configuration(rollout={"mode": "servers"}, asynchrony={"max_staleness": 1}, routing={"sample_rollouts": 3})
    routing, given, score = RoutingReplay(config=config, replay="engine"), groups(), Scorer()
    continued, fresh = (dataclasses.replace(given[1].rollouts[0], version_spans=((0, 3), (1, 1))), dataclasses.replace(given[1].rollouts[1],
                                                                                                                policy_version=1))
    mixed = [given[0], dataclasses.replace(given[1], rollouts=(continued, fresh))]
    routing.prepare(mixed, 1, score, 1)
    (views, _), = score.asked
    assert [view.response_ids for view in views] == [fresh.response_ids], "neither stale nor half stale ones"
    assert routing.figures([stats(None)], torch.full((sum(LENGTHS),), -1.1))["mismatch_free_mean"] == pytest.approx(0.5)
    routing.prepare(mixed, 1, score, 2)
    found = routing.figures([stats(None)], torch.full((sum(LENGTHS),), -1.1))
    assert len(score.asked) == 1 and found["mismatch_free_mean"] is found["mismatch_replayed_max"] is None


def test_a_response_without_routes_is_refused() -> None:
    given = groups()
    bare = dataclasses.replace(given[1], rollouts=(given[1].rollouts[0], dataclasses.replace(given[1].rollouts[1], routes=None)))
    with pytest.raises(MissingRoutes, match="1 rollouts have no routes, first rollout 1 of problem '1'.*routing.replay=off"):
        RoutingReplay(config=configuration(), replay="engine").prepare([given[0], bare], 1, Scorer(), 0)


def test_the_scoring_pass_gives_routes_and_the_students_scores() -> None:
    routing, score = RoutingReplay(config=configuration(), replay="scoring"), Scorer()
    prepared = routing.prepare(groups(routed=False), 1, score, 0)
    assert [r.routes for g in prepared for r in g.rollouts] == [routes(n + 1, seed=100 + i) for i, n in enumerate(LENGTHS)]
    assert score.asked[0][1] and routing.student is not None and routing.student.lengths == LENGTHS


def test_without_a_replay_loaded_routes_are_left_aside() -> None:
    routing = RoutingReplay(config=configuration(), replay="off")
    assert all(r.routes is None for g in routing.prepare(groups(), 1, Scorer(), 0) for r in g.rollouts)
    assert routing.figures([stats(None)], None) == {}


def privileged() -> list[PrivilegedView]:
    """Prompts of five tokens; the second rollout has no teacher."""
    return [PrivilegedView(view=None if i == 1 else ScoringView(prompt_ids=(1, 2, 3, 4, 5), response_ids=r.response_ids), source="peer")
            for i, r in enumerate(r for g in groups() for r in g.rollouts)]


def ask(teacher: str) -> tuple[list[PrivilegedView], list[Request]]:
    asked: list[Request] = []

    def generate(requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        assert sampling.routes and sampling.max_new_tokens == 1
        asked.extend(requests)
        return [Generation(response_ids=(0,), log_probs=(0.0,), truncated=True, routes=routes(len(r.prompt_ids), seed=7)) for r in requests]

    return RoutingReplay(config=configuration(routing={"teacher": teacher}), replay="engine").teacher_views(privileged(), groups(), generate), asked


def test_the_teacher_routes_by_itself_as_the_student_or_as_the_engine_would() -> None:
    free, asked = ask("free")
    assert not asked and all(view.view is None or view.view.routes is None for view in free)
    student, asked = ask("student")
    assert not asked and student[1].view is None
    for view, rollout in zip(student, (r for g in groups() for r in g.rollouts), strict=True):
        if view.view is not None:
            array = view.view.routes.array()
            assert (array[:5] == -1).all() and numpy.array_equal(array[5:], rollout.routes.array()[2:])
            assert len(array) == 5 + len(rollout.response_ids) - 1
    own, asked = ask("own")
    assert [len(r.prompt_ids) for r in asked] == [5 + n - 1 for n in (3, 4, 2)] and own[1].view is None
    assert all(view.view is None or view.view.routes.tokens == 5 + len(view.view.response_ids) - 1 for view in own)


@pytest.mark.parametrize("sections, moe, expected", [
    ({}, True, "engine"), ({}, False, "off"), ({"model": {"dtype": "float32"}}, True, "off"), ({"rollout": {"engine": "megatron"}}, True, "off"),
    ({"routing": {"replay": "scoring"}, "model": {"dtype": "float32"}}, True, "scoring"), ({"routing": {"replay": "off"}}, True, "off"),
])
def test_auto_replays_where_routers_differ(sections: dict[str, Any], moe: bool, expected: str) -> None:
    config = configuration(**sections)
    assert routing_replay(config, moe=moe) == expected
    assert not [problem for problem in rollout_problems(config, moe=moe) if "routing" in problem]


@pytest.mark.parametrize("sections, moe, message", [
    ({"routing": {"replay": "engine"}}, False, "needs a mixture of experts"),
    ({"routing": {"replay": "engine"}, "rollout": {"engine": "megatron"}}, True, "needs rollout.engine=vllm"),
    ({"routing": {"teacher": "own", "replay": "scoring"}}, True, "routing.teacher=own needs routing.replay=engine"),
    ({"routing": {"teacher": "student", "replay": "off"}}, True, "routing.teacher=student needs routing.replay=engine or scoring"),
    ({"routing": {"teacher": "student"}, "algorithm": {"method": "grpo"}}, True, "no teacher"),
    ({"routing": {"teacher": "own"}, "rollout": {"mode": "servers"}, "asynchrony": {"max_staleness": 1}}, True, "cannot go with asynchrony"),
])
def test_what_cannot_be_is_said(sections: dict[str, Any], moe: bool, message: str) -> None:
    found = [problem for problem in rollout_problems(configuration(**sections), moe=moe) if "routing" in problem]
    assert len(found) == 1 and message in found[0]


def test_the_bounds_of_a_ratio() -> None:
    from megatron_antisd.routing import OUTSIDE

    assert math.exp(OUTSIDE) == pytest.approx(1.25) and math.exp(-OUTSIDE) == pytest.approx(0.8)
