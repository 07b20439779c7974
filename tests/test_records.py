"""What the records refuse."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_antisd.records import Problem, Rollout, RolloutGroup


def rollout(**changes: Any) -> Rollout:
    fields: dict[str, Any] = dict(problem_id="p-7", index=3, prompt_ids=(5, 6), response_ids=(8, 9), engine_log_probs=(-0.5, -1.5),
                                  truncated=False, policy_version=0)
    return Rollout(**{**fields, **changes})


def test_response_of_zero_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout 3 of problem 'p-7' has a response of zero tokens; the engine must return at least the end token"):
        rollout(response_ids=(), engine_log_probs=())


@pytest.mark.parametrize("log_probs", [(), (-0.5,), (-0.5, -1.5, -2.5)])
def test_other_number_of_engine_log_probs_is_refused(log_probs: tuple[float, ...]) -> None:
    expected = f"rollout 3 of problem 'p-7': {len(log_probs)} engine log-probs for 2 response tokens; they must be equal in number"
    with pytest.raises(ValueError, match=expected):
        rollout(engine_log_probs=log_probs)


def test_grading_leaves_the_sampled_rollout_ungraded() -> None:
    sampled = rollout()
    graded = sampled.graded(1.0, "right")
    assert (graded.reward, graded.feedback) == (1.0, "right") and sampled.reward is None
    assert graded == rollout(reward=1.0, feedback="right")


def test_group_with_an_ungraded_rollout_has_no_rewards() -> None:
    group = RolloutGroup(problem=Problem(id="p-7", prompt="2+2?", answer="4"), rollouts=(rollout(index=0).graded(1.0, ""), rollout(index=1)))
    with pytest.raises(ValueError, match=r"rollouts \[1\] of problem 'p-7' have no reward; grade the group first"):
        group.rewards()
