"""The entropy gate: lambda = g * lambda_max, with g in {0, 1} driven by the batch's median token entropy H.

    warm-up: W steps at lambda = 0 that record H; H_warm is calibrated from them; the gate leaves warm-up with g = 1
    g <- 0   if g = 1 and H <  tau_down = down * H_warm     (the teacher collapsed: switch off)
    g <- 1   if g = 0 and H >= H_warm                       (it recovered: switch on)
    g unchanged otherwise                                   (a Schmitt trigger: no chatter between the two thresholds)

Source: the gate of arXiv 2605.11609. The paper leaves open, and we choose: H_warm is the median (option: mean) of the W values and must
be positive; step W + 1 already decides on its own H before its update (option: it stays open); a batch without a single teacher token
(H is None) changes nothing and does not count towards W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

GateMode = Literal["teacher", "student", "always"]
WarmStatistic = Literal["median", "mean"]

LAYOUT_ROUNDING = 1e-6
"""By how much (relative above 1 nat) an fp32 entropy median may differ between parallel layouts; a closer decision is marginal."""


def lower_median(values: Sequence[float]) -> float:
    """The middle of the sorted values, the lower of the two for an even count. Raises ValueError when empty or not finite."""
    if not values or not all(math.isfinite(v) for v in values):
        raise ValueError(f"the median needs at least one value and finite ones only, got {list(values)}")
    return sorted(values)[(len(values) - 1) // 2]


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """What one step trains with. Example: `GateDecision(lambda_=0.5, open=True, entropy=0.41, warm=0.40, down=0.372, ...)`."""

    lambda_: float
    """g * lambda_max."""
    open: bool
    """g. False throughout warm-up."""
    entropy: float | None
    """H of this step, nats; None when the batch had no token to measure."""
    warm: float | None
    """H_warm, nats; None until W values are recorded."""
    down: float | None
    """tau_down, nats; None until W values are recorded."""
    marginal: bool
    """H was so close to the threshold in force that another parallel layout may decide otherwise."""
    steps_recorded: int
    """Steps with an entropy since the (last) calibration began, this one included."""


class EntropyGate:
    """Warm-up calibration and Schmitt trigger. Plain Python on one float per step: every rank that feeds the same H decides the same.

    `mode` names the signal: the caller feeds the teacher's median entropy for 'teacher' and 'always', the student's for 'student';
    'always' keeps g = 1 after warm-up. A method without a teacher has no teacher entropy: feed the student's, or warm-up never ends.
    """

    def __init__(
        self, *, mode: GateMode = "teacher", warmup_steps: int = 5, down: float = 0.93, lambda_max: float = 0.5,
        warm_statistic: WarmStatistic = "median", decide_after_warmup: bool = True,
    ) -> None:
        for name, value, allowed in (("mode", mode, get_args(GateMode)), ("warm_statistic", warm_statistic, get_args(WarmStatistic))):
            if value not in allowed:
                raise ValueError(f"gate {name} is {value!r}, expected one of {allowed}")
        for name, number, valid, expected in (
            ("warmup_steps", warmup_steps, warmup_steps >= 1, "an integer >= 1"),
            ("down", down, 0.0 < down < 1.0, "a multiplier of H_warm between 0 and 1"),
            ("lambda_max", lambda_max, 0.0 <= lambda_max < math.inf, "a finite number >= 0"),
        ):
            if not valid:
                raise ValueError(f"gate {name} is {number}, expected {expected}")
        self.mode, self.warmup_steps, self.lambda_max = mode, warmup_steps, lambda_max
        self._down_factor, self._statistic, self._decide_after_warmup = down, warm_statistic, decide_after_warmup
        self.recalibrate()

    def recalibrate(self) -> None:
        """Forget everything and begin a warm-up (continual training: the gate is calibrated against the policy it now meets)."""
        self._open = False
        self._warmup: list[float] = []
        self._warm: float | None = None
        self._down: float | None = None
        self._steps_recorded = 0

    def update(self, entropy: float | None) -> GateDecision:
        """Take H of the batch about to be trained on and decide this step's lambda. None: nothing was measured, nothing changes.

        Raises ValueError when H is not finite, or when the warm-up ends with an H_warm that is not positive; the gate is then unchanged.
        """
        if entropy is None:
            return self._decision(None, opened=self._open, marginal=False)
        entropy = float(entropy)
        if not math.isfinite(entropy):
            raise ValueError(f"the {self.mode} gate got an entropy of {entropy}, expected a finite number of nats (None when the batch "
                             "has no tokens to measure); look for non-finite log-probs in the scores of this step")
        if self._warm is None:
            return self._record_warmup(entropy)
        self._steps_recorded += 1
        undecided = self.mode == "always" or (self._steps_recorded == self.warmup_steps + 1 and not self._decide_after_warmup)
        if undecided:
            return self._decision(entropy, opened=self._open, marginal=False)
        threshold = self._down if self._open else self._warm
        self._open = entropy >= threshold
        return self._decision(entropy, opened=self._open, marginal=abs(entropy - threshold) < LAYOUT_ROUNDING * max(1.0, threshold))

    def _record_warmup(self, entropy: float) -> GateDecision:
        values = [*self._warmup, entropy]
        if len(values) == self.warmup_steps:
            warm = lower_median(values) if self._statistic == "median" else math.fsum(values) / len(values)
            if warm <= 0.0:
                raise ValueError(f"H_warm is {warm} nats, the {self._statistic} of the warm-up entropies {values}; it must be positive to "
                                 "set a threshold: the policy is deterministic already, or the entropies were not measured")
            self._warm, self._down, self._open = warm, self._down_factor * warm, True
        self._warmup = values
        self._steps_recorded += 1
        return self._decision(entropy, opened=False, marginal=False)

    def _decision(self, entropy: float | None, *, opened: bool, marginal: bool) -> GateDecision:
        return GateDecision(lambda_=self.lambda_max if opened else 0.0, open=opened, entropy=entropy, warm=self._warm, down=self._down,
                            marginal=marginal, steps_recorded=self._steps_recorded)

    def _settings(self) -> dict[str, Any]:
        return {"mode": self.mode, "warmup_steps": self.warmup_steps, "down": self._down_factor, "warm_statistic": self._statistic,
                "decide_after_warmup": self._decide_after_warmup}

    def state_dict(self) -> dict[str, Any]:
        """Training state in plain Python values (JSON keeps it exactly): g, H_warm, tau_down, warm-up history, and the settings."""
        return {"open": self._open, "warm": self._warm, "down": self._down, "warmup": list(self._warmup),
                "steps_recorded": self._steps_recorded, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError for missing or unknown keys, or when the gate's settings differ."""
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"the gate's state has the keys {sorted(state)}, expected {sorted(expected)}")
        changed = [f"{name}: saved {state['settings'].get(name)!r}, now {value!r}"
                   for name, value in expected["settings"].items() if state["settings"].get(name) != value]
        if changed:
            raise ValueError(f"the gate was saved under other settings ({'; '.join(changed)}), so its calibration does not carry over; "
                             "resume with the saved ones, or start a continual run that calibrates it anew")
        self._open, self._warm, self._down = state["open"], state["warm"], state["down"]
        self._warmup, self._steps_recorded = list(state["warmup"]), state["steps_recorded"]
