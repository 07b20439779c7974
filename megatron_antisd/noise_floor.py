"""The noise floor of u: with an empty privileged context the teacher's prompt is the student's, so u must be 0. What is measured instead is noise
that every u carries, and phi with it.

    torchrun --nproc-per-node N -m megatron_antisd.noise_floor CONFIG.yaml [key=value ...]

prints it for a configuration, with its parts; a run measures it at its first update and does not start above the limit.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_antisd import batch as batching
from megatron_antisd.config import RunConfig, load_config
from megatron_antisd.config.rollout_rules import routing_replay
from megatron_antisd.data import ProblemSampler
from megatron_antisd.health import Incident
from megatron_antisd.inputs import Inputs, read_inputs
from megatron_antisd.parallel.update_figures import LARGE_U
from megatron_antisd.policy import build_policy
from megatron_antisd.records import NonFiniteScores, PrivilegedView, RolloutGroup, ScoringView, TrainingBatch, UpdateFigures
from megatron_antisd.rollout.engine import Generation, Request, Sampling
from megatron_antisd.rollout.groups import generate_groups
from megatron_antisd.rollout.probe import DEFAULT_LIMIT, synchronise
from megatron_antisd.routing import RoutingReplay
from megatron_antisd.run import SETUP_ERRORS, set_up_logging

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer

Generate = Callable[[Sequence[Request], Sampling], Sequence[Generation | None]]
USAGE = "usage: torchrun --nproc-per-node N -m megatron_antisd.noise_floor CONFIG.yaml [key=value ...]"


def limit_of(config: RunConfig) -> float:
    """Largest mean |u| in nats that is taken for rounding: `noise_floor.limit`, or what two passes of this dtype may differ by."""
    return config.noise_floor.limit or DEFAULT_LIMIT[config.model.dtype]


def first_rollouts(config: RunConfig, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The first `noise_floor.rollouts` rollouts; the last group may be cut short."""
    left, found = config.noise_floor.rollouts, []
    for group in groups:
        found += [dataclasses.replace(group, rollouts=group.rollouts[:left])] if left else []
        left -= min(left, len(group.rollouts))
    return found


def empty_context_views(routing: RoutingReplay, groups: Sequence[RolloutGroup], generate: Generate) -> tuple[ScoringView, ...]:
    """The teacher's views of these rollouts without privileged context, with the experts that the teacher has. Collective."""
    plain = [PrivilegedView(view=dataclasses.replace(view, routes=None), source="empty") for view in batching.student_views(groups)]
    return tuple(view.view for view in routing.teacher_views(plain, groups, generate) if view.view is not None)


def judge(config: RunConfig, step: int, figures: UpdateFigures) -> list[Incident]:
    """What the first update's figures say; none where nothing was measured. An update that was measured above the limit must not be applied, but
    for a run that only watches (`algorithm.shadow`)."""
    mean, limit = figures.noise_floor_mean, limit_of(config)
    if mean is None or mean <= limit:
        return []
    seen = (
        f"with an empty privileged context, where u must be 0, |u| is {mean:.3g} nats on average (largest {figures.noise_floor_max:.3g}, above "
        f"{LARGE_U:g} at {figures.noise_floor_share:.1%} of the tokens), expected at most {limit:g} (noise_floor.limit): the teacher's scoring pass "
        "and the training forward do not compute the same, and every u would carry that noise. Its parts: python -m megatron_antisd.noise_floor "
        "with this configuration. Against routers that differ: routing.teacher=student, or routing.replay=off; against rounding: model.dtype=float32 "
        "or a higher noise_floor.limit where u is far larger")
    action = "log" if config.algorithm.shadow else "stop"
    return [Incident(kind="noise_floor", step=step, action=action, value=mean, limit=limit, seen=seen)]


# -- the command ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """|difference| of two passes over the same tokens, nats."""

    name: str
    mean: float
    max: float
    large: float
    """Share of tokens above `LARGE_U`."""

    @staticmethod
    def of(name: str, one: torch.Tensor, other: torch.Tensor) -> Part:
        difference = (one.double() - other.double()).abs()
        return Part(name=name, mean=float(difference.mean()), max=float(difference.max()), large=float((difference > LARGE_U).double().mean()))


def measure(trainer: Trainer, groups: Sequence[RolloutGroup], teacher: Sequence[ScoringView]) -> list[Part]:
    """The floor, then its parts, over all rollouts of `groups`; `teacher` are their `empty_context_views`. Nothing is updated. Collective. Raises
    NonFiniteScores."""
    student = batching.student_views(groups)
    engine = torch.tensor([p for group in groups for rollout in group.rollouts for p in rollout.engine_log_probs])
    trained = trainer.step(_without_signal(student, engine), 0.0, accept=lambda figures: False).student.log_prob
    scored = trainer.score(teacher).log_prob
    alone = torch.cat([trainer.score([view]).log_prob for view in teacher])
    parts = [Part.of("u with an empty context: scoring - training forward", scored, trained),
             Part.of("packing: prompts shared - each response alone", scored, alone)]
    if tuple(teacher) != student:
        followed = trainer.score(student).log_prob
        parts += [Part.of("routing: the teacher's own experts - those replayed", scored, followed),
                  Part.of("the same experts: scoring - training forward", followed, trained)]
    return [*parts, Part.of("no part of u: engine - training forward", engine, trained)]


def _without_signal(views: tuple[ScoringView, ...], engine: torch.Tensor) -> TrainingBatch:
    """A batch that has the training forward's log-probs and no gradient."""
    return TrainingBatch(
        views=views, sequence_advantage=torch.zeros(len(views)), sequence_mask=torch.ones(len(views), dtype=torch.bool),
        teacher_log_prob=torch.full_like(engine, float("nan")), teacher_mask=torch.zeros(len(engine), dtype=torch.bool), old_log_prob=None,
        engine_log_prob=engine, lambda_=0.0, tokens=len(engine))


def report(config: RunConfig, parts: Sequence[Part], lengths: Sequence[int]) -> str:
    """A Markdown table under a line on what was measured."""
    parallel, world = config.parallel, dist.get_world_size()
    rows = f"{config.trainer.micro_batch_tokens} (training) and {config.trainer.score_micro_batch_tokens} (scoring)"
    layout = (f"{world} rank{'' if world == 1 else 's'}, TP {parallel.tensor_parallel_size}, PP {parallel.pipeline_parallel_size}, CP "
              f"{parallel.context_parallel_size}, EP {parallel.expert_parallel_size}, {config.model.dtype}, rows of "
              f"{rows} tokens, engine {config.rollout.engine}")
    lines = [f"| {p.name} | {p.mean:.2e} | {p.max:.2e} | {p.large:.2%} |" for p in parts]
    verdict = "below" if parts[0].mean <= limit_of(config) else "ABOVE"
    return "\n".join([f"{len(lengths)} rollouts, {sum(lengths)} tokens; {layout}", "",
                      f"| nats | mean | max | above {LARGE_U:g} |", "|---|---|---|---|", *lines, "",
                      f"The floor is {verdict} noise_floor.limit={limit_of(config):g}."])


def _drawn(config: RunConfig, inputs: Inputs) -> tuple[Trainer, list[RolloutGroup], tuple[ScoringView, ...]]:
    """A trainer, rollouts that the engine drew with its weights, and the teacher's views of them."""
    engine, trainer, probe = build_policy(config, inputs, inputs.problems[0])
    try:
        synchronise(engine, trainer.engine_weights, 0, probe)
        rollout, replay = config.rollout, routing_replay(config, moe=trainer.description.experts is not None)
        count = min(math.ceil(config.noise_floor.rollouts / rollout.group_size), len(inputs.problems))
        problems = ProblemSampler(inputs.problems, count, config.run.seed, config.data.shuffle).next()
        sampling = Sampling(temperature=rollout.temperature, top_p=rollout.top_p, max_new_tokens=rollout.max_new_tokens,
                            ignore_eos=rollout.ignore_eos, stop_token_ids=inputs.stop_token_ids, routes=replay == "engine")
        drawn = generate_groups(engine, problems, [inputs.prompts.student_prompt(p) for p in problems], sampling=sampling,
                                 group_size=rollout.group_size, seed=config.run.seed, step=1, decode=lambda ids: "")
        routing = RoutingReplay(config=config, replay=replay)
        groups = routing.prepare(first_rollouts(config, [group for group in drawn if group is not None]), 1, trainer.score, 0)
        return trainer, list(groups), empty_context_views(routing, groups, engine.generate)
    finally:
        engine.close()


def main(arguments: Sequence[str]) -> None:
    """Exits with code 1 where the floor is above the limit."""
    if not arguments:
        sys.exit(USAGE)
    set_up_logging()
    try:
        config = load_config(arguments[0], arguments[1:])
        inputs = read_inputs(config, training=True)
        from megatron_antisd.parallel.layout import start_process_group

        start_process_group(config.collective_seconds)
        trainer, groups, teacher = _drawn(config, inputs)
    except SETUP_ERRORS as error:
        sys.exit(f"configuration error: {error}")
    inputs.grader.close()
    try:
        parts = measure(trainer, groups, teacher)
    except NonFiniteScores as error:
        sys.exit(f"error: {error}")
    if dist.get_rank() == 0:
        print(report(config, parts, [len(rollout.response_ids) for group in groups for rollout in group.rollouts]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if not parts[0].mean <= limit_of(config):  # a NaN is above, too
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
