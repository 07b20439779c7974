"""The gate over drawn settings and entropies: a plain trigger decides the same, and stopping anywhere changes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_antisd.algorithm import EntropyGate, GateDecision

ENTROPY = st.floats(1e-9, 20.0) | st.sampled_from([0.93, 1.0, 0.9299999])
SETTINGS = st.fixed_dictionaries({
    "mode": st.sampled_from(["teacher", "student", "always"]), "warmup_steps": st.integers(1, 6),
    "down": st.floats(0, 1, exclude_min=True, exclude_max=True), "lambda_max": st.floats(0, 10),
    "warm_statistic": st.sampled_from(["median", "mean"]), "decide_after_warmup": st.booleans()})
SERIES = st.lists(st.none() | ENTROPY, max_size=30)


def decisions(gate: EntropyGate, series: Sequence[float | None]) -> list[GateDecision]:
    return [gate.update(entropy) for entropy in series]


@given(settings=SETTINGS, series=SERIES, stops=st.lists(st.integers(0, 30), max_size=4))
def test_saving_and_loading_anywhere_is_invisible(settings: dict[str, Any], series: list[float | None], stops: list[int]) -> None:
    whole = EntropyGate(**settings)
    expected = decisions(whole, series)
    found, gate = [], EntropyGate(**settings)
    places = [0, *sorted(min(stop, len(series)) for stop in stops), len(series)]
    for start, stop in pairwise(places):
        state = gate.state_dict()
        assert json.loads(json.dumps(state)) == state, "JSON keeps it exactly"
        gate = EntropyGate(**settings)
        gate.load_state_dict(json.loads(json.dumps(state)))
        assert gate.state_dict() == state
        found += decisions(gate, series[start:stop])
    assert found == expected and gate.state_dict() == whole.state_dict()


@given(settings=SETTINGS, series=SERIES)
def test_decisions_depend_on_the_measured_entropies_alone(settings: dict[str, Any], series: list[float | None]) -> None:
    """Steps without an entropy drop out, and so does what the gate went through before it was calibrated anew."""
    measured = [entropy for entropy in series if entropy is not None]
    expected = decisions(EntropyGate(**settings), measured)
    with_gaps = decisions(EntropyGate(**settings), series)
    assert [decision for decision, entropy in zip(with_gaps, series, strict=True) if entropy is not None] == expected
    reused = EntropyGate(**settings)
    decisions(reused, series)
    reused.recalibrate()
    assert decisions(reused, measured) == expected


@given(settings=SETTINGS, series=SERIES)
def test_warm_up_is_closed_and_the_trigger_has_hysteresis(settings: dict[str, Any], series: list[float | None]) -> None:
    before, recorded = False, 0
    for decision in decisions(EntropyGate(**settings), series):
        assert decision.lambda_ == (settings["lambda_max"] if decision.open else 0.0)
        if decision.entropy is None:
            assert decision.open == (before or recorded == settings["warmup_steps"]) and not decision.marginal
            continue
        recorded += 1
        assert decision.steps_recorded == recorded
        if recorded <= settings["warmup_steps"]:
            assert not decision.open and not decision.marginal and (decision.warm is None) == (recorded < settings["warmup_steps"])
            continue
        before = before or recorded == settings["warmup_steps"] + 1  # warm-up ends open
        if settings["mode"] == "always" or (recorded == settings["warmup_steps"] + 1 and not settings["decide_after_warmup"]):
            assert decision.open
        elif decision.entropy >= decision.warm:
            assert decision.open
        elif decision.entropy < decision.down:
            assert not decision.open
        else:
            assert decision.open == before, "between the thresholds nothing changes"
        before = decision.open


@given(settings=SETTINGS, series=SERIES, broken=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_an_entropy_that_is_none_leaves_the_gate_as_it_was(settings: dict[str, Any], series: list[float | None], broken: float) -> None:
    gate = EntropyGate(**settings)
    decisions(gate, series)
    before = gate.state_dict()
    with pytest.raises(ValueError, match="expected a finite number of nats"):
        gate.update(broken)
    assert gate.state_dict() == before


@given(settings=SETTINGS, series=st.lists(ENTROPY, min_size=1, max_size=30), scale=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_the_trigger_knows_no_unit(settings: dict[str, Any], series: list[float], scale: float) -> None:
    """Entropies in another unit (a power of two, so that nothing is rounded) open and close it alike."""
    first, second = (decisions(EntropyGate(**settings), values) for values in (series, [scale * value for value in series]))
    assert [decision.open for decision in first] == [decision.open for decision in second]
