"""The entropy gate: calibration, the trigger, resume, and what it refuses."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import FrozenInstanceError

import pytest
import torch

from megatron_antisd.algorithm import EntropyGate, GateDecision, lower_median

WARMUP = [1.2, 0.8, 1.0, 1.1, 0.9]  # H_warm = 1.0, tau_down = 0.93


def warmed(**settings: object) -> EntropyGate:
    gate = EntropyGate(**settings)
    for entropy in WARMUP:
        gate.update(entropy)
    return gate


def opens(gate: EntropyGate, entropies: list[float | None]) -> str:
    return "".join("1" if gate.update(h).open else "0" for h in entropies)


def test_warm_up_runs_closed_and_calibrates() -> None:
    gate = EntropyGate()
    for step, entropy in enumerate(WARMUP, start=1):
        decision = gate.update(entropy)
        assert (decision.open, decision.lambda_, decision.entropy, decision.marginal) == (False, 0.0, entropy, False)
        assert decision.steps_recorded == step
        assert (decision.warm, decision.down) == ((1.0, 0.93) if step == 5 else (None, None))
    assert gate.update(1.5) == GateDecision(lambda_=0.5, open=True, entropy=1.5, warm=1.0, down=0.93, marginal=False, steps_recorded=6)


@pytest.mark.parametrize(("first", "expected"), [(0.5, "0"), (0.93, "1"), (0.9299, "0"), (2.0, "1")])
def test_the_step_after_warm_up_decides_on_its_own_entropy(first: float, expected: str) -> None:
    assert opens(warmed(), [first]) == expected


def test_or_stays_open_for_that_step_as_an_option() -> None:
    gate = warmed(decide_after_warmup=False)
    assert opens(gate, [None, 0.5, 0.5, 0.99, 1.0]) == "11001"  # None is no step: 0.5 is still the first one


@pytest.mark.parametrize(("entropies", "expected"), [
    ([1.0, 0.95, 0.94, 0.931, 0.95], "11111"),      # between the thresholds an open gate stays open
    ([0.92, 0.94, 0.99, 0.999, 0.94], "00000"),     # and a closed one stays closed
    ([0.92, 1.0, 0.94, 0.92, 1.01, 0.93], "011011"),
    ([0.93, 0.92999, 0.99999, 1.0], "1001"),        # equality: open at tau_down stays open, H_warm itself opens
])
def test_schmitt_trigger(entropies: list[float], expected: str) -> None:
    gate = warmed()
    assert opens(gate, entropies) == expected
    assert gate.update(0.0).lambda_ == 0.0


def test_against_a_plain_trigger_on_random_walks() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        width, factor = draw.randint(1, 8), draw.choice([0.90, 0.93, 0.95])
        walk = [abs(1 + draw.gauss(0, 0.1)) for _ in range(60)]
        gate = EntropyGate(warmup_steps=width, down=factor, lambda_max=0.25)
        warm, g, expected = statistics.median_low(walk[:width]), 1, [0.0] * width
        for h in walk[width:]:
            g = 0 if g and h < factor * warm else 1 if not g and h >= warm else g
            expected.append(0.25 * g)
        assert [gate.update(h).lambda_ for h in walk] == expected


@pytest.mark.parametrize(("statistic", "values", "warm"), [
    ("median", [4.0, 1.0, 3.0, 2.0], 2.0), ("mean", [4.0, 1.0, 3.0, 2.0], 2.5),
    ("median", [3.0, 1.0, 2.0], 2.0), ("mean", [1.0, 1.0, 4.0], 2.0),
])
def test_warm_statistic(statistic: str, values: list[float], warm: float) -> None:
    gate = EntropyGate(warmup_steps=len(values), warm_statistic=statistic, down=0.5)
    decision = [gate.update(v) for v in values][-1]
    assert (decision.warm, decision.down) == (warm, warm / 2)


def test_lower_median() -> None:
    draw = random.Random(0)
    for count in range(1, 30):
        values = [draw.gauss(0, 1) for _ in range(count)]
        assert lower_median(values) == statistics.median_low(values) == torch.tensor(values, dtype=torch.float64).median().item()
    for bad in ([], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="median"):
            lower_median(bad)


def test_mode_always_stays_open_after_warm_up() -> None:
    gate = EntropyGate(mode="always")
    assert opens(gate, [*WARMUP, 0.01, 5.0, None, 0.01]) == "000001111"


def test_mode_student_is_the_same_trigger() -> None:
    assert opens(warmed(mode="student"), [0.92, 0.99, 1.0]) == "001"


def test_no_entropy_changes_nothing_and_does_not_count() -> None:
    gate = EntropyGate()
    for entropy in WARMUP:
        decision = gate.update(None)
        assert (decision.entropy, decision.lambda_, decision.open, decision.marginal) == (None, 0.0, False, False)
        assert gate.update(entropy).lambda_ == 0.0
    before = gate.state_dict()
    decision = gate.update(None)
    assert (decision.open, decision.lambda_, decision.entropy, decision.steps_recorded) == (True, 0.5, None, 5)
    assert gate.state_dict() == before
    assert opens(gate, [0.9, None, None, 0.99, None, 1.0, None]) == "0000011"


@pytest.mark.parametrize(("previous", "entropy", "marginal"), [
    ([], 0.93 + 5e-7, True), ([], 0.93 - 5e-7, True), ([], 0.93 + 2e-6, False), ([], 1.0, False),
    ([0.5], 1.0 - 5e-7, True), ([0.5], 1.0, True), ([0.5], 1.0 - 2e-6, False), ([0.5], 0.93, False),
])
def test_marginal_only_beside_the_threshold_in_force(previous: list[float], entropy: float, marginal: bool) -> None:
    gate = warmed()
    for h in previous:
        gate.update(h)
    assert gate.update(entropy).marginal is marginal


def test_marginal_is_relative_above_one_nat_and_never_without_a_decision() -> None:
    gate = EntropyGate(warmup_steps=1, down=0.5)
    assert not gate.update(20.0).marginal
    assert gate.update(10.0 + 8e-6).marginal
    always = EntropyGate(mode="always", warmup_steps=1, down=0.5)
    always.update(1.0)
    assert not always.update(0.5).marginal
    late = EntropyGate(warmup_steps=1, down=0.5, decide_after_warmup=False)
    late.update(1.0)
    assert not late.update(0.5).marginal
    assert late.update(0.5).marginal


@pytest.mark.parametrize("settings", [
    {}, {"decide_after_warmup": False}, {"warm_statistic": "mean"}, {"mode": "always"}, {"warmup_steps": 4},
])
def test_resume_at_any_step_repeats_the_decisions(settings: dict) -> None:
    draw = random.Random(7)
    walk = [None if draw.random() < 0.2 else 1 + draw.gauss(0, 0.08) for _ in range(40)]
    whole = EntropyGate(**settings)
    expected = [whole.update(h) for h in walk]
    assert {d.open for d in expected} == {True, False}
    for step in range(len(walk) + 1):
        first = EntropyGate(**settings)
        for h in walk[:step]:
            first.update(h)
        resumed = EntropyGate(**settings)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        first.update(0.001)  # the saved state is a copy: what the old gate does later does not reach the new one
        assert [resumed.update(h) for h in walk[step:]] == expected[step:]


def test_state_survives_torch_save(tmp_path) -> None:
    gate = warmed()
    gate.update(0.5)
    torch.save(gate.state_dict(), tmp_path / "gate.pt")
    resumed = EntropyGate()
    resumed.load_state_dict(torch.load(tmp_path / "gate.pt", weights_only=True))
    assert resumed.state_dict() == gate.state_dict()
    assert opens(resumed, [0.99, 1.0]) == "01"


def test_recalibrate_begins_a_fresh_warm_up() -> None:
    gate = warmed()
    gate.update(0.5)
    gate.recalibrate()
    assert gate.state_dict() == EntropyGate().state_dict()
    assert opens(gate, [2.4, 1.6, 2.0, 2.2, 1.8]) == "00000"
    decision = gate.update(1.87)
    assert (decision.warm, decision.open) == (2.0, True)
    assert not gate.update(1.85).open


def test_loading_refuses_other_settings_and_broken_states() -> None:
    state = warmed().state_dict()
    with pytest.raises(ValueError, match=r"down: saved 0.93, now 0.9"):
        EntropyGate(down=0.90).load_state_dict(state)
    with pytest.raises(ValueError, match="keys"):
        EntropyGate().load_state_dict({key: value for key, value in state.items() if key != "warm"})
    other_strength = EntropyGate(lambda_max=0.1)  # not part of the calibration
    other_strength.load_state_dict(state)
    assert other_strength.update(1.0).lambda_ == 0.1


@pytest.mark.parametrize("entropy", [math.nan, math.inf, -math.inf])
def test_an_entropy_that_is_not_finite_raises_and_leaves_the_gate(entropy: float) -> None:
    for gate in (EntropyGate(), warmed()):
        before = gate.state_dict()
        with pytest.raises(ValueError, match="finite"):
            gate.update(entropy)
        assert gate.state_dict() == before


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.0, 1.0], [-1e-9, 3.0]])
def test_h_warm_must_be_positive(values: list[float]) -> None:
    gate = EntropyGate(warmup_steps=2)
    gate.update(values[0])
    before = gate.state_dict()
    with pytest.raises(ValueError, match="must be positive"):
        gate.update(values[1])
    assert gate.state_dict() == before


@pytest.mark.parametrize("settings", [
    {"mode": "off"}, {"warm_statistic": "max"}, {"warmup_steps": 0}, {"down": 1.0}, {"down": 0.0}, {"lambda_max": -1.0},
    {"lambda_max": math.nan},
])
def test_settings_are_checked(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"gate {next(iter(settings))} is"):
        EntropyGate(**settings)


def test_it_takes_the_gate_section_as_it_is() -> None:
    from megatron_antisd.config import GateConfig
    assert EntropyGate(**GateConfig().model_dump(), lambda_max=0.5).state_dict() == EntropyGate().state_dict()


def test_a_decision_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        EntropyGate().update(1.0).open = True
