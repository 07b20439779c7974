"""Grade groups of rollouts: every rank its share, all results on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading.pool import GradingPool
from megatron_antisd.grading.verdict import GradingTask, Verdict
from megatron_antisd.records import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class GradedGroups:
    groups: tuple[RolloutGroup, ...]
    timeouts: int
    """Answers of the whole batch that ran out of time and scored 0."""
    crashes: int
    """Answers of the whole batch whose grader died or raised, and scored 0."""


def grade_groups(groups: Sequence[RolloutGroup], pool: GradingPool, feedback: PrivilegedConfig) -> GradedGroups:
    """Set reward and feedback of every rollout. Collective when torch.distributed is initialised."""
    tasks = [GradingTask(response=r.text, answer=group.problem.answer, tests=group.problem.tests) for group in groups for r in group.rollouts]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = pool.grade_many(tasks[rank::world])
    reports = [mine]
    if world > 1:
        reports = [None] * world  # type: ignore[list-item]
        dist.all_gather_object(reports, mine)
    verdicts: list[Verdict | None] = [None] * len(tasks)
    for place, report in enumerate(reports):
        verdicts[place::world] = report.verdicts
    graded, position = [], 0
    for group in groups:
        rollouts = []
        for rollout in group.rollouts:
            verdict = verdicts[position]
            usual = feedback.correct if verdict.reward >= 1.0 else feedback.incorrect
            rollouts.append(rollout.graded(verdict.reward, usual if verdict.feedback is None else verdict.feedback))
            position += 1
        graded.append(RolloutGroup(problem=group.problem, rollouts=tuple(rollouts)))
    return GradedGroups(groups=tuple(graded), timeouts=sum(r.timeouts for r in reports), crashes=sum(r.crashes for r in reports))
