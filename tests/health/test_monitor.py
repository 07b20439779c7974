"""Each kind of incident fires where its rule says and nowhere else, and what the monitor remembers survives a save and a load."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_antisd.config import HealthConfig
from megatron_antisd.health import HealthMonitor, Incident, refuses, strongest
from megatron_antisd.records import NonFiniteScores, UpdateFigures

NAN, INF = math.nan, math.inf
GRADIENT = {"gradient_spike": {"window": 4, "factor": 10.0}}


def monitor(**sections: Any) -> HealthMonitor:
    return HealthMonitor(HealthConfig(**sections))


def figures(**changes: Any) -> UpdateFigures:
    values: dict[str, Any] = dict(loss=0.1, grad_norm=1.0, clip_fraction=0.0, student_entropy_mean=0.5, mismatch_kl=0.001, mismatch_mean=0.01,
                                  mismatch_max=0.1)
    return UpdateFigures(**{**values, **changes})


def norms(health: HealthMonitor, values: list[float], first: int = 1) -> list[list[str]]:
    return [[i.kind for i in health.of_update(step, figures(grad_norm=norm))] for step, norm in enumerate(values, start=first)]


def spikes(health: HealthMonitor, values: list[float]) -> list[int]:
    """Positions in `values` at which a spike is found."""
    return [i for i, found in enumerate(norms(health, values)) if found == ["gradient_spike"]]


def steps_with(found: list[list[Incident]]) -> list[int]:
    return [step for step, incidents in enumerate(found, start=1) if incidents]


# -- not finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "named"), [
    ({"loss": NAN}, "loss nan"), ({"loss": -INF}, "loss -inf"), ({"grad_norm": NAN}, "gradient norm nan"), ({"grad_norm": INF}, "gradient norm inf"),
    ({"student_entropy_mean": NAN}, "student's mean entropy nan"), ({"broken_tokens": 3}, "3 log-probs of the student, so their u"),
    ({"loss": NAN, "grad_norm": INF}, "loss nan, gradient norm inf"),
])
@pytest.mark.parametrize("action", ["skip", "stop", "rollback"])
def test_what_is_not_finite_is_refused_and_named(changes: dict[str, Any], named: str, action: str) -> None:
    broken = figures(**changes)
    assert not broken.finite
    (incident,) = monitor(non_finite={"action": action}).of_update(7, broken)
    assert (incident.kind, incident.step, incident.action, incident.limit) == ("non_finite", 7, action, None)
    assert not math.isfinite(incident.value) and incident.row()["value"] is None
    assert incident.message.startswith(f"step 7: not finite: {named};") and refuses([incident])
    json.dumps(incident.row(), allow_nan=False)


def test_what_is_not_finite_is_judged_for_nothing_else_and_not_remembered() -> None:
    health = monitor(**GRADIENT, entropy_collapse={"steps": 2})
    norms(health, [1.0, 1.0, 1.0])
    before = health.state_dict()
    assert len(health.of_update(4, figures(loss=NAN, grad_norm=500.0, student_entropy_mean=0.0, mismatch_kl=9.0))) == 1
    assert health.state_dict() == before


def test_mean_reward_that_is_not_finite() -> None:
    health = monitor()
    (incident,) = health.before_update(3, reward_mean=NAN, truncation_rate=0.0)
    assert (incident.kind, incident.action) == ("non_finite", "skip") and "mean reward is nan, look at the grader" in incident.message
    assert health.state_dict()["rewards"] == []


def test_scores_that_are_not_finite() -> None:
    error = NonFiniteScores("the log-probs are not finite", token=7, lengths=(3, 4, 5))
    assert (error.token, error.view, error.position) == (7, 2, 0) and isinstance(error, ValueError)
    last, first = NonFiniteScores("", token=6, lengths=(3, 4, 5)), NonFiniteScores("", token=0, lengths=(3, 4, 5))
    assert (last.view, last.position, first.view, first.position) == (1, 3, 0, 0)
    incident = monitor().of_scores(5, error, "teacher")
    assert incident.message.startswith("step 5: the teacher's scores are not finite, first at response token 0 of scored response 2 (the log-")
    assert refuses([incident]) and "the student's scores" in monitor().of_scores(5, error, "student").message


# -- gradient spikes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "before", "norm", "fires"), [
    (4, [1.0] * 4, 10.0, False),  # at the limit
    (4, [1.0] * 4, 10.000001, True),
    (4, [1.0] * 3, 1e9, False),  # too few norms
    (4, [9.0] * 9 + [1.0] * 4, 11.0, True),  # what left the window does not count
    (4, [1.0, 1.0, 3.0, 3.0], 20.0, False),  # the mean of the two middle ones, 2
    (4, [1.0, 1.0, 3.0, 3.0], 20.1, True),
    (50, [1.0] * 9, 1e9, False), (50, [1.0] * 10, 1e9, True),
    (4, [1.0] * 4, 0.0, False),
    (4, [0.0] * 9, 1e9, False), (4, [0.0, 1.0] * 4, 11.0, True), (4, [0.0] * 9 + [1.0] * 3, 11.0, False),  # zeros are no norms
])
def test_gradient_spike(window: int, before: list[float], norm: float, fires: bool) -> None:
    health = monitor(gradient_spike={"window": window, "factor": 10.0})
    assert spikes(health, [*before, norm]) == ([len(before)] if fires else [])


def test_spike_says_what_to_change() -> None:
    health = monitor(**GRADIENT)
    norms(health, [0.5] * 4)
    (incident,) = health.of_update(12, figures(grad_norm=8.0))
    assert (incident.value, incident.limit) == (8.0, 5.0)
    assert incident.message == ("step 12: the gradient norm is 8, 16 times the median 0.5 of the 4 norms before it; the limit is 10 times "
                                "(health.gradient_spike.factor); training goes on [health.gradient_spike.action]")


def test_spikes_leave_the_median_alone() -> None:
    health = monitor(gradient_spike={"window": 4, "factor": 10.0})
    assert spikes(health, [1.0] * 4 + [50.0, 1.0] * 20) == list(range(4, 44, 2))


def test_a_lasting_level_is_no_spike_in_the_end() -> None:
    health = monitor(gradient_spike={"window": 4, "factor": 10.0})
    assert spikes(health, [1.0] * 4 + [50.0] * 9 + [501.0]) == [4, 5, 6, 7, 13]
    health = monitor(gradient_spike={"window": 30, "factor": 10.0})
    assert spikes(health, [1.0] * 30 + [50.0] * 20) == list(range(30, 40))


@pytest.mark.parametrize("action", ["skip", "stop", "rollback"])
def test_spikes_that_are_not_applied_never_become_a_level(action: str) -> None:
    health = monitor(gradient_spike={"window": 4, "factor": 10.0, "action": action})
    assert spikes(health, [1.0] * 4 + [50.0] * 30) == list(range(4, 34))


def test_norm_of_an_update_refused_for_another_reason_does_not_count() -> None:
    health = monitor(**GRADIENT, mismatch={"action": "skip"})
    for step in range(1, 9):
        assert refuses(health.of_update(step, figures(grad_norm=1.0, mismatch_kl=1.0)))
    assert health.state_dict()["norms"] == []


# -- entropy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropies", "expected"), [
    ([0.1, 0.1, 0.1], [3]),
    ([0.1, 0.1, 0.2, 0.1, 0.1], []),  # interrupted by a step at the limit
    ([0.1] * 13, [3, 13]),  # logged again at every tenth
    ([0.1] * 3 + [0.3] + [0.1] * 3, [3, 7]),
    ([0.0] * 3, [3]),
])
def test_entropy_collapse(entropies: list[float], expected: list[int]) -> None:
    health = monitor(entropy_collapse={"below": 0.2, "steps": 3})
    assert steps_with([health.of_update(step, figures(student_entropy_mean=h)) for step, h in enumerate(entropies, start=1)]) == expected


def test_entropy_collapse_that_stops_is_found_at_every_step() -> None:
    health = monitor(entropy_collapse={"below": 0.2, "steps": 3, "action": "stop"})
    assert steps_with([health.of_update(step, figures(student_entropy_mean=0.1)) for step in range(1, 7)]) == [3, 4, 5, 6]


def test_entropy_is_that_of_a_steps_first_update() -> None:
    health = monitor(entropy_collapse={"below": 0.2, "steps": 2})
    found = [health.of_update(step, figures(student_entropy_mean=h)) for step, h in [(1, 0.1), (1, 0.1), (1, 0.5), (2, 0.1), (2, 0.1)]]
    assert steps_with(found) == [4]
    assert found[3][0].message == ("step 2: the student's mean token entropy is 0.1 nats, below 0.2 (health.entropy_collapse.below) for 2 steps in "
                                   "a row; training goes on [health.entropy_collapse.action]")


# -- reward, truncation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rewards", "expected"), [
    ([1.0, 1.0, 0.0, 0.0], [4]),  # means 1, 0.5, 0; the limit is 0.25
    ([1.0, 1.0, 0.25, 0.25], []),  # at the limit
    ([1.0, 1.0, 0.25, 0.2499], [4]),
    ([0.0] * 30, []),  # nothing to fall from
    ([-1.0] * 3 + [-9.0] * 9, []),  # never above 0
    ([0.5, 0.5, -1.0, 0.5, 0.5], [3, 4]),  # means 0.5, -0.25, -0.25, 0.5
    ([1.0, 0.0], []),  # one window, none before it
    ([1.0, 1.0, 0.5, 0.5, 0.2, 0.2], [6]),  # of the best, not of the last
    ([0.4, 0.4, 1.0, 1.0, 0.24, 0.24], [6]),
    ([1.0, 1.0] + [0.0] * 13, [4, 14]),  # logged again at every tenth
])
def test_reward_collapse(rewards: list[float], expected: list[int]) -> None:
    health = monitor(reward_collapse={"window": 2, "share": 0.25, "action": "log"})
    found = [health.before_update(step, reward_mean=r, truncation_rate=0.0) for step, r in enumerate(rewards, start=1)]
    every_step = monitor(reward_collapse={"window": 2, "share": 0.25, "action": "stop"})
    stops = [every_step.before_update(step, reward_mean=r, truncation_rate=0.0) for step, r in enumerate(rewards, start=1)]
    if rewards == [0.5, 0.5, -1.0, 0.5, 0.5]:
        assert steps_with(stops) == expected and steps_with(found) == expected[:1]
    else:
        assert steps_with(found) == expected and steps_with(stops)[:1] == expected[:1]
    assert all(i.kind == "reward_collapse" for incidents in found for i in incidents)


def test_reward_collapse_says_what_to_change() -> None:
    health = monitor(reward_collapse={"window": 1})
    health.before_update(1, reward_mean=0.8, truncation_rate=0.0)
    (incident,) = health.before_update(2, reward_mean=0.1, truncation_rate=0.0)
    assert incident.message == ("step 2: the mean reward of 1 step (health.reward_collapse.window) is 0.1, below 0.2, 0.25 "
                                "(health.reward_collapse.share) of the best such mean, 0.8; training goes on [health.reward_collapse.action]")


@pytest.mark.parametrize(("share", "steps", "rates", "expected"), [
    (1.0, 1, [0.999, 1.0, 0.999], [2]),
    (0.9, 2, [0.9, 0.89, 0.9, 0.95], [4]),
    (1.0, 1, [1.0] * 12, [1, 11]),
])
def test_all_truncated(share: float, steps: int, rates: list[float], expected: list[int]) -> None:
    health = monitor(all_truncated={"share": share, "steps": steps})
    assert steps_with([health.before_update(step, reward_mean=0.5, truncation_rate=r) for step, r in enumerate(rates, start=1)]) == expected
    acting = monitor(all_truncated={"share": share, "steps": steps, "action": "skip"})
    found = [acting.before_update(step, reward_mean=0.5, truncation_rate=r) for step, r in enumerate(rates, start=1)]
    assert steps_with(found) == (list(range(1, 13)) if len(rates) == 12 else expected) and refuses(sum(found, []))


def test_values_that_are_missing_are_not_judged() -> None:
    health = monitor(all_truncated={"steps": 2})
    health.before_update(1, reward_mean=0.5, truncation_rate=1.0)
    before = health.state_dict()
    assert health.before_update(2, reward_mean=None, truncation_rate=None) == [] and health.state_dict() == before


# -- mismatch -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kls", "expected"), [
    ([0.05], []), ([0.0500001], [1]), ([NAN], [1]), ([INF], [1]), ([0.1] * 12, [1, 11]), ([0.1, 0.0, 0.1], [1, 3]),
])
def test_mismatch(kls: list[float], expected: list[int]) -> None:
    health = monitor(mismatch={"kl": 0.05})
    found = [health.of_update(step, figures(mismatch_kl=kl)) for step, kl in enumerate(kls, start=1)]
    assert steps_with(found) == expected and not refuses(sum(found, []))
    acting = monitor(mismatch={"kl": 0.05, "action": "skip"})
    assert [refuses(acting.of_update(step, figures(mismatch_kl=kl))) for step, kl in enumerate(kls, start=1)] == [not kl <= 0.05 for kl in kls]


# -- actions and rollbacks ------------------------------------------------------------------------------------------------


def test_strongest_action() -> None:
    def of(*actions: str) -> str | None:
        return strongest([Incident(kind="mismatch", step=1, action=a, value=1.0, limit=0.5, seen="") for a in actions])

    assert of() is None and of("log") == "log" and of("log", "skip") == "skip"
    assert of("skip", "rollback", "log") == "rollback" and of("rollback", "stop", "skip") == "stop"
    assert not refuses([])


def test_rollbacks_are_counted_across_them_and_end() -> None:
    health = monitor(**GRADIENT, non_finite={"action": "rollback"}, max_rollbacks=2)
    norms(health, [1.0, 2.0])
    saved = health.state_dict()
    norms(health, [3.0, 4.0], first=3)
    for made in (1, 2):
        (incident,) = health.of_update(5, figures(loss=NAN))
        assert incident.action == "rollback" and incident.message.endswith("goes back to its newest checkpoint [health.non_finite.action]")
        health.roll_back(saved)
        assert health.state_dict() == {**saved, "rollbacks": made}
    (incident,) = health.of_update(5, figures(loss=NAN))
    assert incident.action == "stop" and refuses([incident])
    assert "the run stops (instead of a rollback: 2 of health.max_rollbacks=2 are made)" in incident.message
    resumed = monitor(non_finite={"action": "rollback"}, max_rollbacks=2)
    resumed.load_state_dict(health.state_dict())
    assert resumed.of_update(6, figures(loss=NAN))[0].action == "stop"


def test_no_rollback_where_none_is_allowed() -> None:
    assert monitor(non_finite={"action": "rollback"}, max_rollbacks=0).of_update(1, figures(loss=NAN))[0].action == "stop"


# -- training state -------------------------------------------------------------------------------------------------------


ALERT = {
    "gradient_spike": {"window": 4, "factor": 3.0}, "entropy_collapse": {"below": 0.3, "steps": 2}, "reward_collapse": {"window": 3, "share": 0.6},
    "mismatch": {"kl": 0.05}, "all_truncated": {"share": 0.8, "steps": 2}, "non_finite": {"action": "rollback"}, "max_rollbacks": 1,
}
"""So touchy that random series meet every rule."""
ACTIONS = {"log": {}, "skip": {"gradient_spike": {**ALERT["gradient_spike"], "action": "skip"}, "mismatch": {"kl": 0.05, "action": "skip"}}}
STEP = st.fixed_dictionaries({
    "reward_mean": st.sampled_from([None, -0.5, 0.0, 0.1, 0.5, 1.0, NAN]), "truncation_rate": st.sampled_from([0.0, 0.79, 0.8, 1.0]),
    "updates": st.lists(st.fixed_dictionaries({
        "loss": st.sampled_from([0.1, 0.1, 0.1, NAN]), "grad_norm": st.sampled_from([0.0, 0.9, 1.0, 1.1, 5.0, 40.0]),
        "student_entropy_mean": st.sampled_from([0.1, 0.29, 0.3, 0.5]), "mismatch_kl": st.sampled_from([0.01, 0.05, 0.06, NAN])}), max_size=2)})


def follow(health: HealthMonitor, steps: list[dict[str, Any]], first: int) -> list[str]:
    told = []
    for step, one in enumerate(steps, start=first):
        found = health.before_update(step, reward_mean=one["reward_mean"], truncation_rate=one["truncation_rate"])
        for update in one["updates"]:
            found = found + health.of_update(step, figures(**update))
        told += [json.dumps(incident.row(), allow_nan=False) for incident in found]
    return told


@settings(deadline=None, max_examples=150)
@given(steps=st.lists(STEP, max_size=25), cut=st.integers(0, 25), actions=st.sampled_from(["log", "skip"]))
def test_saving_and_loading_anywhere_does_not_show(steps: list[dict[str, Any]], cut: int, actions: str) -> None:
    config = {**ALERT, **ACTIONS[actions]}
    whole = monitor(**config)
    expected = follow(whole, steps, 1)
    first = monitor(**config)
    told = follow(first, steps[:cut], 1)
    second = monitor(**config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    told += follow(second, steps[cut:], 1 + len(steps[:cut]))
    assert told == expected and second.state_dict() == whole.state_dict()


@settings(deadline=None, max_examples=50)
@given(reward=st.floats(-10, 10), rate=st.floats(0, 0.99), norm=st.floats(0, 1e6), entropy=st.floats(0.005, 10), kl=st.floats(0, 0.05),
       updates=st.integers(1, 3))
def test_a_constant_healthy_series_has_no_incident(reward: float, rate: float, norm: float, entropy: float, kl: float, updates: int) -> None:
    health = monitor()
    for step in range(1, 121):
        assert health.before_update(step, reward_mean=reward, truncation_rate=rate) == []
        for _ in range(updates):
            assert health.of_update(step, figures(grad_norm=norm, student_entropy_mean=entropy, mismatch_kl=kl)) == []


def test_what_is_remembered_is_bounded() -> None:
    health = monitor()
    for step in range(1, 300):
        health.before_update(step, reward_mean=0.5, truncation_rate=0.0)
        health.of_update(step, figures(grad_norm=1.0 + step % 2 * 30.0))
    state = health.state_dict()
    assert len(state["norms"]) <= 50 and len(state["rewards"]) == 20 and len(state["spikes"]) < 10


def test_state_under_other_windows() -> None:
    health = monitor(gradient_spike={"window": 5}, reward_collapse={"window": 3})
    for step, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0], start=1):
        health.before_update(step, reward_mean=value, truncation_rate=0.0)
        health.of_update(step, figures(grad_norm=value))
    smaller = monitor(gradient_spike={"window": 2}, reward_collapse={"window": 2})
    smaller.load_state_dict(health.state_dict())
    state = smaller.state_dict()
    assert (state["norms"], state["rewards"], state["best_reward"], state["reward_window"]) == ([4.0, 5.0], [4.0, 5.0], None, 2)


def test_state_with_other_keys_is_refused() -> None:
    state = monitor().state_dict()
    for broken in ({k: v for k, v in state.items() if k != "norms"}, {**state, "more": 1}, {**state, "in_a_row": {}}):
        with pytest.raises(ValueError, match="the health monitor's state has the keys"):
            monitor().load_state_dict(broken)
