"""Which experts a step's passes use: the engine's, those of a scoring pass, or each pass its own; and how much that matters.

R3 (`routing.replay: engine`): the update goes to the experts that the tokens were sampled with, so that trainer and engine compute the same policy
where bfloat16 alone would make their routers differ. R2 (`scoring`): the update goes to the experts of the trainer's own pass before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from megatron_antisd.config import RunConfig
from megatron_antisd.records import PrivilegedView, Rollout, RolloutGroup, ScoringView, StepStats, TokenScores
from megatron_antisd.rollout.engine import Generation, Request, Sampling
from megatron_antisd.token_routes import TokenRoutes

Replay = Literal["engine", "scoring", "off"]

OUTSIDE = math.log(1.25)
"""Beyond this difference of log-probs, nats, the ratio of probabilities lies outside 0.8 .. 1.25."""


class Score(Protocol):
    """`Trainer.score`."""

    def __call__(self, views: Sequence[ScoringView], *, record_routes: bool = False) -> TokenScores: ...


class MissingRoutes(ValueError):
    """Rollouts that were to be replayed do not say which experts their tokens went to."""


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """|trainer - engine log-prob| of some rollouts with the trainer's own experts."""

    tokens: torch.Tensor
    """Their response tokens' places among all of the batch."""
    engine: torch.Tensor
    free: torch.Tensor
    """Of each of those tokens, nats."""


@dataclass(kw_only=True)
class RoutingReplay:
    """The present step's; every rank holds the same."""

    config: RunConfig
    replay: Replay
    """What `routing.replay` comes to for this model (`config.rollout_rules.routing_replay`)."""
    student: TokenScores | None = None
    """With `scoring`: the pass that recorded the experts, which is also the student's scoring pass."""
    _sample: _Sample | None = None

    def prepare(self, groups: Sequence[RolloutGroup], step: int, score: Score, version: int) -> tuple[RolloutGroup, ...]:
        """The rollouts with the experts that the update is to use; `version`: of the policy that it trains. Collective. Raises MissingRoutes, and
        what `score` raises."""
        self.student, self._sample = None, None
        if self.replay == "engine":
            self._require_routes(groups)
            if (step - 1) % self.config.routing.sample_every == 0:
                self._measure(groups, score, version)
        if self.replay == "scoring":
            self.student = score([_view(r) for group in groups for r in group.rollouts], record_routes=True)
            routes = iter(self.student.routes)
            return tuple(dataclasses.replace(group, rollouts=tuple(dataclasses.replace(r, routes=next(routes)) for r in group.rollouts))
                         for group in groups)
        return tuple(groups if self.replay == "engine" else _without_routes(groups))

    def _require_routes(self, groups: Sequence[RolloutGroup]) -> None:
        missing = [rollout for group in groups for rollout in group.rollouts if rollout.routes is None]
        if missing:
            raise MissingRoutes(
                f"{len(missing)} rollouts have no routes, first rollout {missing[0].index} of problem {missing[0].problem_id!r}: the engine returned "
                "none, or they were saved by a run that had none (debug.load_rollouts). Set routing.replay=off, or scoring")

    def _measure(self, groups: Sequence[RolloutGroup], score: Score, version: int) -> None:
        """Score some rollouts, spread over the batch, as without a replay. Drawn ahead, only such as the present weights drew throughout, if any: the
        difference of others is the policy's own motion, too."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        fresh = [i for i, rollout in enumerate(rollouts)
                 if not self.config.asynchrony.max_staleness or all(of == version for of, _ in rollout.spans)]
        if not fresh:
            return
        count = min(self.config.routing.sample_rollouts, len(fresh))
        chosen = [fresh[len(fresh) * i // count] for i in range(count)]
        first = torch.tensor([0, *(len(r.response_ids) for r in rollouts)]).cumsum(0)
        engine = torch.tensor([p for i in chosen for p in rollouts[i].engine_log_probs])
        self._sample = _Sample(tokens=torch.cat([torch.arange(first[i], first[i + 1]) for i in chosen]), engine=engine,
                               free=(score([_view(rollouts[i]) for i in chosen]).log_prob - engine).abs())

    def teacher_views(self, views: Sequence[PrivilegedView], groups: Sequence[RolloutGroup],
                      generate: Callable[[Sequence[Request], Sampling], Sequence[Generation | None]]) -> list[PrivilegedView]:
        """The teacher's views of the rollouts, with the experts that `routing.teacher` says. Collective; `own` asks the engine."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if self.config.routing.teacher == "student":
            return [_with_routes(view, _of_response(rollout, view)) for view, rollout in zip(views, rollouts, strict=True)]
        if self.config.routing.teacher == "own":
            shown = [view.view for view in views if view.view is not None]
            # The one token drawn is not looked at: what counts is the pass over all before it, which are the view's input tokens.
            requests = [Request(prompt_ids=(*view.prompt_ids, *view.response_ids[:-1]), seed=0) for view in shown]
            sampling = Sampling(temperature=self.config.rollout.temperature, top_p=1.0, max_new_tokens=1, ignore_eos=True, routes=True)
            generations = iter(generate(requests, sampling) if requests else ())
            return [view if view.view is None else _with_routes(view, next(generations).routes) for view in views]
        return list(views)

    def figures(self, stats: Sequence[StepStats], student: torch.Tensor | None) -> dict[str, float | None]:
        """For the step's row; empty without a replay. `student` [T]: log-probs of the whole batch under the policy that sampled it."""
        if self.replay == "off":
            return {}
        layers = self.layers(stats)
        found: dict[str, float | None] = {"routes_equal_share": None, "routes_equal_share_min": None}
        if layers:
            found = {"routes_equal_share": sum(layers) / len(layers), "routes_equal_share_min": min(layers)}
        replayed = None if self._sample is None or student is None else (student[self._sample.tokens] - self._sample.engine).abs()
        for name, difference in (("free", self._sample and self._sample.free), ("replayed", replayed)):
            found[f"mismatch_{name}_mean"] = None if difference is None else float(difference.double().mean())
            found[f"mismatch_{name}_max"] = None if difference is None else float(difference.max())
            found[f"mismatch_{name}_outside"] = None if difference is None else float((difference > OUTSIDE).double().mean())
        return found

    def layers(self, stats: Sequence[StepStats]) -> list[float]:
        """Of each layer, over the step's first update, whose weights sampled: the share of tokens whose own choice is the set they were given. Empty
        where nothing was replayed."""
        return list(stats[0].routes_equal or ()) if stats else []


def _view(rollout: Rollout) -> ScoringView:
    """The student's, as without a replay."""
    return ScoringView(prompt_ids=rollout.prompt_ids, response_ids=rollout.response_ids)


def _without_routes(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Of loaded rollouts: a run without a replay must not follow another's experts."""
    if all(rollout.routes is None for group in groups for rollout in group.rollouts):
        return list(groups)
    return [dataclasses.replace(group, rollouts=tuple(dataclasses.replace(r, routes=None) for r in group.rollouts)) for group in groups]


def _of_response(rollout: Rollout, view: PrivilegedView) -> TokenRoutes | None:
    """The student's experts of the response behind the teacher's prompt, which routes by itself."""
    if rollout.routes is None or view.view is None:
        return None
    return rollout.routes.of_last(len(rollout.response_ids) - 1, free=len(view.view.prompt_ids))


def _with_routes(view: PrivilegedView, routes: TokenRoutes | None) -> PrivilegedView:
    return view if view.view is None else dataclasses.replace(view, view=dataclasses.replace(view.view, routes=routes))
