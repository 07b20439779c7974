"""Batches of rollouts that are drawn while earlier ones are trained on (`asynchrony`): so many steps ahead that no token of a batch lies more than
`max_staleness` policy versions behind the weights that it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_antisd.config import ConfigError, RunConfig
from megatron_antisd.data import ProblemSampler, PromptBuilder
from megatron_antisd.durable import write_whole
from megatron_antisd.metrics.files import ROLLOUT_VERSIONS
from megatron_antisd.records import Problem, Rollout, RolloutGroup
from megatron_antisd.rollout.engine import Finished, Generation, Request, Sampling
from megatron_antisd.rollout.groups import make_groups, make_requests
from megatron_antisd.rollout.restarting import RestartingEngine
from megatron_antisd.rollout.servers.batch import Spans


@dataclass(kw_only=True, eq=False)
class _Drawn:
    """The batch of one step."""

    step: int
    problems: list[Problem]
    prompts: list[tuple[int, ...]]
    requests: list[Request]
    cuts: list[Spans] | None
    sampler_state: dict[str, Any]
    """Before its problems were drawn."""
    began: float
    owner: Any = None
    """The engine that draws it; an engine that was restarted draws it anew."""
    pending: Any = None


class Ahead:
    """Collective, as the engine is."""

    def __init__(self, config: RunConfig, *, engine: RestartingEngine, sampler: ProblemSampler, prompts: PromptBuilder, sampling: Sampling,
                 decode: Callable[[Sequence[int]], str], is_main: bool) -> None:
        self._config, self._engine, self._sampler, self._prompts, self._sampling = config, engine, sampler, prompts, sampling
        self._decode, self._is_main = decode, is_main
        self._queue: dict[int, _Drawn] = {}
        self._steps = config.asynchrony.max_staleness // config.algorithm.updates_per_batch
        """How many further batches are drawn beside the one that is waited for."""
        self._version, self._hidden = 0, 0.0  # of the last batch that was taken
        self._cuts: dict[int, list[Spans]] = {}
        """By step, of the run that is replayed."""
        if config.asynchrony.replay is not None:
            for step in range(1, config.run.steps + 1):
                self._cuts[step] = read_versions(Path(config.asynchrony.replay), step, config.rollout.problems_per_step * config.rollout.group_size)

    def problems(self, step: int) -> list[Problem]:
        """Of the step's batch. It and those behind it are on their way afterwards."""
        for each in range(step, min(step + self._steps, self._config.run.steps) + 1):
            if each not in self._queue:
                self._queue[each] = self._draw(each)
        self._engine.attempt(self._begin)
        return self._queue[step].problems

    def take(self, step: int, finished: Finished | None) -> list[RolloutGroup]:
        """The step's groups. Raises RuntimeError for tokens older than the bound."""
        self._hidden = time.monotonic() - self._queue[step].began

        def complete(engine: Any) -> list[Generation]:
            self._begin(engine)
            return engine.complete(self._queue[step].pending, finished)

        generations = self._engine.attempt(complete)
        drawn = self._queue.pop(step)
        groups = make_groups(drawn.problems, drawn.prompts, generations, group_size=self._config.rollout.group_size,
                             version=self._engine.policy_version, decode=self._decode)
        rollouts = [rollout for group in groups if group is not None for rollout in group.rollouts]
        self._version = self._engine.policy_version
        require_fresh(rollouts, self._version, self._config.asynchrony.max_staleness)
        if self._is_main:
            file = versions_file(self._config.directory, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, [json.dumps([rollout.spans for rollout in rollouts]).encode()])
        return [group for group in groups if group is not None]

    def figures(self, groups: Sequence[RolloutGroup], student: torch.Tensor | None) -> dict[str, float | int | None]:
        """Of the batch that was taken last, for its row. `student`: log-probs of its tokens by the weights that it trains. Not collective."""
        return {**staleness_figures(groups, self._version, student), "seconds_hidden_generate": self._hidden}

    def go_on(self) -> None:
        """The new weights are in the engine, and proved: draw on."""
        self._engine.attempt(lambda engine: engine.go_on())

    def sampler_state(self) -> dict[str, Any]:
        """Of the sampler before the oldest batch that was not trained on: a run that is resumed draws them again."""
        return min(self._queue.values(), key=lambda drawn: drawn.step).sampler_state if self._queue else self._sampler.state_dict()

    def clear(self) -> None:
        """Forget what is under way, as after a rollback; its problems are passed over."""
        for drawn in self._queue.values():
            self._engine.attempt(lambda engine, drawn=drawn: engine.withdraw(drawn.pending) if drawn.owner is engine else None)
        self._queue.clear()

    def _draw(self, step: int) -> _Drawn:
        state = self._sampler.state_dict()
        problems = self._sampler.next()
        prompts = [self._prompts.student_prompt(problem) for problem in problems]
        requests = make_requests(problems, prompts, group_size=self._config.rollout.group_size, seed=self._config.run.seed, step=step)
        return _Drawn(step=step, problems=problems, prompts=prompts, requests=requests, cuts=self._cuts.get(step), sampler_state=state,
                      began=time.monotonic())

    def _begin(self, engine: Any) -> None:
        """All that this engine does not draw yet, the oldest first."""
        for _, drawn in sorted(self._queue.items()):
            if drawn.owner is not engine:
                drawn.pending, drawn.owner = engine.begin(drawn.requests, self._sampling, cuts=drawn.cuts, ahead=True), engine
        engine.go_on()


def require_fresh(rollouts: Sequence[Rollout], version: int, bound: int) -> None:
    """Raises RuntimeError where a rollout's oldest token lies more than `bound` policy versions behind `version`, or before it."""
    for rollout in rollouts:
        if not 0 <= version - rollout.policy_version <= bound:
            raise RuntimeError(f"rollout {rollout.index} of problem {rollout.problem_id!r} begins with policy version {rollout.policy_version} and "
                               f"would train version {version}: more than asynchrony.max_staleness={bound} behind")


def staleness_figures(groups: Sequence[RolloutGroup], version: int, student: torch.Tensor | None) -> dict[str, float | int | None]:
    """How many policy versions the tokens of a batch lie behind the weights that they train, and, of those that lie behind none, the largest
    |trainer - engine log-prob| (None where there are none, or no `student` log-probs [T])."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    behind = torch.tensor([version - of for rollout in rollouts for of, count in rollout.spans for _ in range(count)])
    engine = torch.tensor([log_prob for rollout in rollouts for log_prob in rollout.engine_log_probs])
    fresh = None if student is None else (student - engine)[behind == 0].abs()
    return {"staleness_mean": float(behind.double().mean()), "staleness_max": int(behind.max()),
            "continued_rollouts": sum(len(rollout.version_spans) > 1 for rollout in rollouts),
            "mismatch_fresh_max": None if fresh is None or not len(fresh) else float(fresh.max())}


def versions_file(directory: Path, step: int) -> Path:
    return directory / ROLLOUT_VERSIONS / f"step_{step:06d}.json"


def read_versions(directory: Path, step: int, requests: int) -> list[Spans]:
    """Where the run in `directory` cut the responses of a step. Raises ConfigError."""
    path = versions_file(directory, step)
    if not path.is_file():
        raise ConfigError(f"asynchrony.replay: {directory} has no {path.relative_to(directory)}; it must be the directory of a run with "
                          "asynchrony.max_staleness above 0 that has trained that step")
    spans = [tuple((version, tokens) for version, tokens in rollout) for rollout in json.loads(path.read_text())]
    if len(spans) != requests:
        raise ConfigError(f"asynchrony.replay: {path} has {len(spans)} rollouts, this run draws {requests}")
    return spans
