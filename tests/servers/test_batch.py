"""Responses in stretches, and the seeds of the stretches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_antisd.ahead import read_versions, require_fresh, staleness_figures
from megatron_antisd.config import ConfigError
from megatron_antisd.records import Problem, Rollout, RolloutGroup
from megatron_antisd.rollout.engine import EngineFailure, Generation, Request, Sampling
from megatron_antisd.rollout.servers.batch import continued_seed, make_batch

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=6, stop_token_ids=(0,))


def drawn(*ids: int, truncated: bool = False) -> Generation:
    return Generation(response_ids=ids, log_probs=tuple(-1.0 for _ in ids), truncated=truncated)


def test_a_response_in_stretches() -> None:
    (response,) = make_batch({4: Request(prompt_ids=(9, 9), seed=5)}, SAMPLING).responses
    assert response.next_request(0) == (Request(prompt_ids=(9, 9), seed=5), SAMPLING)
    assert not response.add(drawn(1, 2), 0, stopped=True)
    assert not response.add(None, 0, stopped=True)
    request, sampling = response.next_request(1)
    assert request == Request(prompt_ids=(9, 9, 1, 2), seed=continued_seed(5, 2)) and sampling.max_new_tokens == 4
    assert not response.add(drawn(3), 1, stopped=True)
    assert not response.add(drawn(4), 1, stopped=True)  # stopped twice under the same weights
    assert response.add(drawn(5, 0), 3, stopped=False)
    whole = response.generation()
    assert whole.response_ids == (1, 2, 3, 4, 5, 0) and whole.version_spans == ((0, 2), (1, 2), (3, 2)) and not whole.truncated


def test_a_response_that_meets_its_limit_in_a_later_stretch_is_truncated() -> None:
    (response,) = make_batch({0: Request(prompt_ids=(9,), seed=5)}, SAMPLING).responses
    assert not response.add(drawn(1, 2), 0, stopped=True)
    assert response.add(drawn(3, 4, 5, 6, truncated=True), 1, stopped=False)
    assert response.generation().truncated


def test_cuts_bound_what_each_version_draws() -> None:
    (response,) = make_batch({0: Request(prompt_ids=(9,), seed=5)}, SAMPLING, [((1, 2), (3, 4))]).responses
    assert [response.may_run(version) for version in range(5)] == [False, True, False, True, False]
    assert response.next_request(1)[1].max_new_tokens == 2
    assert not response.add(drawn(1, 2, truncated=True), 1, stopped=False)  # cut, not at its limit
    assert [response.may_run(version) for version in range(5)] == [False, False, False, True, False]
    assert response.next_request(3)[1].max_new_tokens == 4
    assert response.add(drawn(3, 0), 3, stopped=False)


def test_no_response_is_complete_without_a_token() -> None:
    (response,) = make_batch({0: Request(prompt_ids=(9,), seed=5)}, SAMPLING).responses
    with pytest.raises(EngineFailure, match="without a token"):
        response.generation()


def test_seeds_of_stretches_differ_and_the_first_is_the_responses_own() -> None:
    seeds = [continued_seed(7, tokens) for tokens in range(200)]
    assert seeds[0] == 7 and len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [continued_seed(7, tokens) for tokens in range(200)]


def rollout(*spans: tuple[int, int]) -> Rollout:
    tokens = sum(count for _, count in spans)
    return Rollout(problem_id="p", index=3, prompt_ids=(1,), response_ids=(2,) * tokens, engine_log_probs=(-1.0,) * tokens, truncated=False,
                   policy_version=spans[0][0], version_spans=spans if len(spans) > 1 else ())


def test_the_bound_is_asserted_for_each_rollout() -> None:
    require_fresh([rollout((4, 2), (5, 1)), rollout((6, 1))], 6, 2)
    with pytest.raises(RuntimeError, match="rollout 3 of problem 'p' begins with policy version 3 and would train version 6: more than .*=2 behind"):
        require_fresh([rollout((5, 1)), rollout((3, 1), (6, 9))], 6, 2)
    with pytest.raises(RuntimeError, match="begins with policy version 7"):
        require_fresh([rollout((7, 1))], 6, 2)  # of weights that were given up


def test_staleness_counts_tokens() -> None:
    group = RolloutGroup(problem=Problem(id="p", prompt="?", answer=""), rollouts=(rollout((4, 2), (5, 1)), rollout((6, 3))))
    student = torch.tensor([-9.0, -9.0, -9.0, -1.25, -1.0, -1.5])
    counts = {"staleness_mean": pytest.approx(5 / 6), "staleness_max": 2, "continued_rollouts": 1}
    assert staleness_figures([group], 6, student) == {**counts, "mismatch_fresh_max": 0.5}
    assert staleness_figures([group], 6, None) == {**counts, "mismatch_fresh_max": None}
    assert staleness_figures([group], 7, student)["mismatch_fresh_max"] is None


def test_spans_must_add_up() -> None:
    with pytest.raises(ValueError, match=r"must add up to 2 response tokens and begin with policy version 1"):
        Rollout(problem_id="p", index=0, prompt_ids=(1,), response_ids=(2, 3), engine_log_probs=(-1.0, -1.0), truncated=False, policy_version=1,
                version_spans=((1, 1),))


def test_a_replay_needs_the_other_runs_cuts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no rollout_versions/step_000002.json"):
        read_versions(tmp_path, 2, 4)
    (tmp_path / "rollout_versions").mkdir()
    (tmp_path / "rollout_versions" / "step_000002.json").write_text("[[[0, 4]], [[0, 1], [1, 2]]]")
    assert read_versions(tmp_path, 2, 2) == [((0, 4),), ((0, 1), (1, 2))]
    with pytest.raises(ConfigError, match="has 2 rollouts, this run draws 4"):
        read_versions(tmp_path, 2, 4)
