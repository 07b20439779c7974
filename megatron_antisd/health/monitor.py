"""The rules by which a run's numbers are judged, each on values that every rank holds alike, so that every rank decides alike.

    non_finite        loss, gradient norm, student's entropy or a log-prob of the update is NaN or infinite; so is a score or the mean reward
    gradient_spike    norm > factor * median of the last `window` norms; those are of updates that were applied, above 0 and no spikes;
                      none is judged before min(10, window) of them; as many spikes in a row, applied, are a new level and become the norms
    entropy_collapse  the student's mean entropy < below at `steps` steps in a row; a step's first update is the one that is judged
    reward_collapse   mean reward of the last `window` steps < share * the best such mean before, where that is above 0
    mismatch          mismatch_kl of an update > kl, or not finite
    all_truncated     truncated share of the batch >= share at `steps` steps in a row

An update that is not finite is judged for nothing else and leaves all that is remembered as it was. What lasts is found again at every
step, so that an action other than `log` acts at every step; `log` says it at first and then every 10th time in a row.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from megatron_antisd.config import HealthConfig
from megatron_antisd.config.reliability import Action
from megatron_antisd.health.incident import Incident, Kind, refuses
from megatron_antisd.records import NonFiniteScores, UpdateFigures

FEWEST_NORMS = 10
"""Norms before one is judged (fewer where the window is smaller), and spikes in a row that are a new level."""
SAY_AGAIN = 10
"""Of an incident that lasts and is only logged, every so many steps in a row are told."""


class HealthMonitor:
    """Judges steps in their order; what it remembers of those before is training state."""

    def __init__(self, config: HealthConfig, *, on_policy: bool = True) -> None:
        """Not `on_policy`, rollouts may be older than the weights that they train, and the mismatch says how far those moved: it is not judged."""
        self.config, self._on_policy = config, on_policy
        self.rollbacks = 0
        """Rollbacks made so far in this run. The caller may raise it to what a journal counts: a checkpoint does not know of those after it."""
        self._norms: list[float] = []
        self._spikes: list[float] = []
        self._rewards: list[float] = []
        self._best_reward: float | None = None
        self._entropy_step = 0
        self._in_a_row: dict[str, int] = {"entropy_collapse": 0, "reward_collapse": 0, "mismatch": 0, "all_truncated": 0}

    # -- what is judged, and when ---------------------------------------------------------------------------------------

    def before_update(self, step: int, *, reward_mean: float | None, truncation_rate: float | None) -> list[Incident]:
        """Of a graded batch, once a step, before anything is scored or updated. A value that is None is not judged and not remembered."""
        found = [] if truncation_rate is None else self._truncated(step, truncation_rate)
        if reward_mean is None:
            return found
        if not math.isfinite(reward_mean):
            return [*found, self._not_finite(step, reward_mean, f"the mean reward is {reward_mean}, look at the grader")]
        return [*found, *self._reward(step, reward_mean)]

    def of_scores(self, step: int, error: NonFiniteScores, whose: str = "teacher") -> Incident:
        """Of a scoring pass that broke: there is no u, so no update of this batch can be made. Nothing is remembered."""
        where = f"response token {error.position} of scored response {error.view}"
        return self._not_finite(step, math.nan, f"the {whose}'s scores are not finite, first at {where} ({error})")

    def of_update(self, step: int, figures: UpdateFigures) -> list[Incident]:
        """Of an update that is about to be applied. The caller applies it unless `refuses(found)`; a norm is remembered on that promise."""
        if not figures.finite:
            values = {"loss": figures.loss, "gradient norm": figures.grad_norm, "student's mean entropy": figures.student_entropy_mean}
            parts = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
            parts += [f"{figures.broken_tokens} log-probs of the student, so their u"] if figures.broken_tokens else []
            value = next((value for value in values.values() if not math.isfinite(value)), math.nan)
            return [self._not_finite(step, value, f"not finite: {', '.join(parts)}")]
        mismatch = self._mismatch(step, figures.mismatch_kl) if self._on_policy else []
        found = [*self._entropy(step, figures.student_entropy_mean), *mismatch]
        spike = self._spike(step, figures.grad_norm)
        found += [] if spike is None else [spike]
        if not refuses(found):
            self._remember_norm(figures.grad_norm, is_spike=spike is not None)
        return found

    # -- the rules ------------------------------------------------------------------------------------------------------

    def _not_finite(self, step: int, value: float, seen: str) -> Incident:
        return self._incident("non_finite", step, self.config.non_finite.action, value, None, seen)

    def _spike(self, step: int, norm: float) -> Incident | None:
        settings = self.config.gradient_spike
        if len(self._norms) < min(FEWEST_NORMS, settings.window):
            return None
        median = statistics.median(self._norms)
        limit = settings.factor * median
        if norm <= limit:
            return None
        return self._incident("gradient_spike", step, settings.action, norm, limit, (
            f"the gradient norm is {norm:.4g}, {norm / median:.3g} times the median {median:.4g} of the {len(self._norms)} norms before it; the "
            f"limit is {settings.factor:g} times (health.gradient_spike.factor)"))

    def _remember_norm(self, norm: float, *, is_spike: bool) -> None:
        if norm == 0.0:
            return  # a batch without a signal says nothing of how large gradients are
        window = self.config.gradient_spike.window
        if not is_spike:
            self._norms = [*self._norms, norm][-window:]
            self._spikes = []
            return
        self._spikes.append(norm)
        if len(self._spikes) >= min(FEWEST_NORMS, window):
            self._norms, self._spikes = self._spikes, []

    def _entropy(self, step: int, entropy: float) -> list[Incident]:
        if step == self._entropy_step:
            return []  # a later update of the same batch: the policy that sampled it was judged already
        self._entropy_step = step
        settings = self.config.entropy_collapse
        count = self._count("entropy_collapse", entropy < settings.below, settings.steps, settings.action)
        return [] if not count else [self._incident("entropy_collapse", step, settings.action, entropy, settings.below, (
            f"the student's mean token entropy is {entropy:.4g} nats, below {settings.below:g} (health.entropy_collapse.below) for {count} "
            f"step{_s(count)} in a row"))]

    def _mismatch(self, step: int, kl: float) -> list[Incident]:
        settings = self.config.mismatch
        if not self._count("mismatch", not kl <= settings.kl, 1, settings.action):  # a NaN is above every bound
            return []
        return [self._incident("mismatch", step, settings.action, kl, settings.kl, (
            f"mismatch_kl is {kl:.4g} nats, the bound {settings.kl:g} (health.mismatch.kl): engine and trainer disagree on the log-probs of "
            "sampled tokens"))]

    def _truncated(self, step: int, rate: float) -> list[Incident]:
        settings = self.config.all_truncated
        count = self._count("all_truncated", rate >= settings.share, settings.steps, settings.action)
        return [] if not count else [self._incident("all_truncated", step, settings.action, rate, settings.share, (
            f"{100 * rate:.4g} % of the responses are truncated, at least {100 * settings.share:.4g} % (health.all_truncated.share) for {count} "
            f"step{_s(count)} in a row; they may need a higher rollout.max_new_tokens"))]

    def _reward(self, step: int, reward: float) -> list[Incident]:
        settings = self.config.reward_collapse
        self._rewards = [*self._rewards, reward][-settings.window :]
        if len(self._rewards) < settings.window:
            return []
        mean, best = math.fsum(self._rewards) / settings.window, self._best_reward
        self._best_reward = mean if best is None else max(mean, best)
        limit = settings.share * best if best is not None and best > 0 else -math.inf
        if not self._count("reward_collapse", mean < limit, 1, settings.action):
            return []
        return [self._incident("reward_collapse", step, settings.action, mean, limit, (
            f"the mean reward of {settings.window} step{_s(settings.window)} (health.reward_collapse.window) is {mean:.4g}, below {limit:.4g}, "
            f"{settings.share:g} (health.reward_collapse.share) of the best such mean, {best:.4g}"))]

    def _count(self, kind: Kind, holds: bool, needed: int, action: Action) -> int:
        """How often in a row this held, where that is an incident to be told; else 0."""
        self._in_a_row[kind] = count = self._in_a_row[kind] + 1 if holds else 0
        again = action != "log" or (count - needed) % SAY_AGAIN == 0
        return count if count >= needed and again else 0

    def _incident(self, kind: Kind, step: int, action: Action, value: float, limit: float | None, seen: str) -> Incident:
        incident = Incident(kind=kind, step=step, action=action, value=value, limit=limit, seen=seen)
        if action == "rollback" and self.rollbacks >= self.config.max_rollbacks:
            return incident.instead("stop", f"instead of a rollback: {self.rollbacks} of health.max_rollbacks={self.config.max_rollbacks} are made")
        return incident

    # -- training state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, in plain Python values (JSON keeps it exactly)."""
        return {"norms": list(self._norms), "spikes": list(self._spikes), "rewards": list(self._rewards), "best_reward": self._best_reward,
                "reward_window": self.config.reward_collapse.window, "entropy_step": self._entropy_step, "in_a_row": dict(self._in_a_row),
                "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. A smaller window keeps the newest of what it holds; another reward window forgets the best
        mean, which was one of other windows. Raises ValueError for missing or unknown keys."""
        expected = self.state_dict()
        if state.keys() != expected.keys() or state["in_a_row"].keys() != expected["in_a_row"].keys():
            raise ValueError(f"the health monitor's state has the keys {sorted(state)} and in_a_row {sorted(state.get('in_a_row', ()))}, expected "
                             f"{sorted(expected)} and {sorted(expected['in_a_row'])}")
        window = self.config.reward_collapse.window
        self._norms = list(state["norms"])[-self.config.gradient_spike.window :]
        self._spikes, self._rewards = list(state["spikes"]), list(state["rewards"])[-window:]
        self._best_reward = state["best_reward"] if state["reward_window"] == window else None
        self._entropy_step, self._in_a_row, self.rollbacks = state["entropy_step"], dict(state["in_a_row"]), state["rollbacks"]

    def roll_back(self, state: dict[str, Any]) -> None:
        """As `load_state_dict`, for a rollback: what was remembered goes back too, the count of rollbacks goes on."""
        made = max(self.rollbacks, state["rollbacks"]) + 1
        self.load_state_dict(state)
        self.rollbacks = made


def _s(count: int) -> str:
    return "" if count == 1 else "s"
