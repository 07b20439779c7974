"""Experts of tokens as a value: what goes in comes out, what cannot be is refused, and files keep or leave them as they say."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from megatron_antisd.data.packing import Bundle, pack
from megatron_antisd.metrics.scored_rollouts import read_scored, write_scored
from megatron_antisd.records import PrivilegedView, Problem, Rollout, RolloutGroup, ScoredGroup, ScoredRollout, ScoringView
from megatron_antisd.rollout.replay import load_rollouts, save_rollouts
from megatron_antisd.token_routes import TokenRoutes, json_bytes, routes_from_json


def experts(tokens: int, layers: int = 3, top_k: int = 2, count: int = 8, seed: int = 0) -> numpy.ndarray:
    rng = numpy.random.default_rng(seed)
    return numpy.stack([[rng.permutation(count)[:top_k] for _ in range(layers)] for _ in range(tokens)]).reshape(tokens, layers, top_k)


@pytest.mark.parametrize("count, dtype", [(8, "uint8"), (256, "uint8"), (1000, "uint16")])
def test_an_array_comes_back(count: int, dtype: str) -> None:
    array = experts(50, count=count)
    array[0, 0, 0] = count - 1
    routes = TokenRoutes.of(array)
    assert (routes.tokens, routes.layers, routes.top_k, routes.dtype) == (50, 3, 2, dtype)
    assert numpy.array_equal(routes.array(), array) and routes.array().dtype == numpy.int16
    assert pickle.loads(pickle.dumps(routes)) == routes and hash(routes) == hash(TokenRoutes.of(array))
    assert routes_from_json(json.loads(json.dumps(dataclasses.asdict(routes), default=json_bytes))) == routes
    assert len(repr(routes)) < 100, "a message that names them must stay readable"


def test_free_tokens_stand_before_the_others() -> None:
    array = experts(6)
    routes = TokenRoutes.of(array, free=4)
    assert routes.tokens == 10
    assert (routes.array()[:4] == -1).all() and numpy.array_equal(routes.array()[4:], array)
    other = routes.of_last(3, free=7)
    assert other.tokens == 10 and numpy.array_equal(other.array()[7:], array[3:])
    assert routes.of_last(0, free=5).tokens == 5
    with pytest.raises(ValueError, match="last 7 tokens of 10, of which 4 have none"):
        routes.of_last(7, free=0)


@pytest.mark.parametrize("array, message", [
    (experts(4)[0], r"shape \(3, 2\)"), (experts(4).astype(float), "float64"), (experts(4) - 100, "ids from -"), (experts(4) + 40000, "to 40007"),
])
def test_what_is_no_route_is_refused(array: numpy.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRoutes.of(array)


def test_bytes_must_be_whole_tokens() -> None:
    with pytest.raises(ValueError, match="7 bytes are no whole number of tokens"):
        TokenRoutes(data=b"1234567", layers=3, top_k=2)
    with pytest.raises(ValueError, match="uint8 or uint16"):
        TokenRoutes(data=b"", layers=3, top_k=2, dtype="int64")


def rollout(routes: TokenRoutes | None) -> Rollout:
    return Rollout(problem_id="p", index=0, prompt_ids=(5, 6, 7), response_ids=(8, 9), engine_log_probs=(-1.0, -2.0), truncated=False,
                   policy_version=3, routes=routes, reward=1.0, feedback="right")


def test_a_rollout_takes_no_routes_of_another_length() -> None:
    assert rollout(TokenRoutes.of(experts(4))).routes.tokens == 4
    with pytest.raises(ValueError, match="routes of 5 tokens; its prompt of 3 and its response of 2 put 4 tokens into the model"):
        rollout(TokenRoutes.of(experts(5)))


def test_saved_rollouts_keep_routes_and_the_u_lens_leaves_them_out(tmp_path: Path) -> None:
    problem = Problem(id="p", prompt="?", answer="1")
    group = RolloutGroup(problem=problem, rollouts=(rollout(TokenRoutes.of(experts(4))),))
    save_rollouts(tmp_path / "saved", 1, [group])
    assert load_rollouts(tmp_path / "saved", 1) == [group]
    shown = ScoringView(prompt_ids=(1, 2), response_ids=(8, 9), routes=TokenRoutes.of(experts(3)))
    scored = ScoredGroup(problem=problem, rollouts=(ScoredRollout(
        rollout=group.rollouts[0], privileged=PrivilegedView(view=shown, source="peer"), student_log_prob=(-1.0, -2.0), teacher_log_prob=None),))
    path = write_scored(tmp_path / "scored", 1, "antisd", [scored], str)
    assert b"routes" not in path.read_bytes()
    back = read_scored(path).groups[0].rollouts[0]
    assert back.rollout == dataclasses.replace(group.rollouts[0], routes=None) and back.privileged.view.routes is None


def test_a_row_holds_each_views_experts_and_one_trunks() -> None:
    arrays = [experts(7, seed=1), experts(6, seed=2), None]
    arrays[1][:3] = arrays[0][:3]
    views = [ScoringView(prompt_ids=(1, 2, 3, 4), response_ids=(5, 6, 7, 8), routes=TokenRoutes.of(arrays[0])),
             ScoringView(prompt_ids=(1, 2, 3, 9), response_ids=(5, 6, 7), routes=TokenRoutes.of(arrays[1])),
             ScoringView(prompt_ids=(4,), response_ids=(5, 6))]
    bundles = [Bundle(indices=(2,), trunk=0), Bundle(indices=(0, 1), trunk=3)]
    micro = pack(views, bundles, multiple=8)
    assert micro.routes.shape == (len(micro.input_ids), 3, 2) and micro.routes.dtype == torch.int16
    expected = [numpy.full((2, 3, 2), -1), arrays[0][:3], arrays[0][3:], arrays[1][3:], numpy.full((micro.padding, 3, 2), -1)]
    assert numpy.array_equal(micro.routes.numpy(), numpy.concatenate(expected))
    assert pack(views, bundles[:1], multiple=8).routes is None


def test_a_trunk_has_the_experts_of_the_first_view_with_any() -> None:
    routes = TokenRoutes.of(experts(5))
    views = [ScoringView(prompt_ids=(1, 2, 3, 4), response_ids=(5, 6)), ScoringView(prompt_ids=(1, 2, 3, 4), response_ids=(7, 8), routes=routes)]
    packed = pack(views, [Bundle(indices=(0, 1), trunk=3)], multiple=1).routes.numpy()
    assert numpy.array_equal(packed[:3], routes.array()[:3])
    assert (packed[3:5] == -1).all() and numpy.array_equal(packed[5:], routes.array()[3:])
