"""The rollouts of a step in the trainer's own time: one round of generation or, with `tails.dynamic_sampling`, several. Everything is collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from megatron_antisd.batch import Overlong
from megatron_antisd.config import PrivilegedConfig
from megatron_antisd.grading.groups import EarlyGrading, GradedGroups
from megatron_antisd.keeping import pause
from megatron_antisd.records import RolloutGroup
from megatron_antisd.rollout.groups import generate_groups
from megatron_antisd.run import Run


class Settled:
    """Grading that is complete already."""

    def __init__(self, graded: GradedGroups) -> None:
        self._graded = graded

    def complete(self, groups: Sequence[RolloutGroup], feedback: PrivilegedConfig) -> GradedGroups:
        """See EarlyGrading.complete; `groups` must be those that were graded."""
        if len(groups) != len(self._graded.groups):
            raise ValueError(f"got {len(groups)} groups, {len(self._graded.groups)} were graded")
        return self._graded


def draw(run: Run, step: int) -> tuple[list[RolloutGroup], EarlyGrading | Settled]:
    """`rollout.problems_per_step` groups of the next problems, and their grading, which is under way or (in rounds) done.

    With `tails.dynamic_sampling` groups whose rewards, as the advantage sees them, are all equal leave the batch and as many further problems
    are drawn, until it is full or `tails.dynamic_rounds` are over; then the first of the equal groups fill it up."""
    if run.ahead is not None:
        with EarlyGrading(run.grader, run.ahead.problems(step), run.config.rollout.group_size, run.decode) as grading:
            return run.ahead.take(step, grading), grading
    wanted, tails, seen = run.config.rollout.problems_per_step, run.config.tails, Counter()
    if not tails.dynamic_sampling:
        return _round(run, step, wanted, seen)
    overlong, kept, equal, rounds = Overlong.of(run.config), [], [], []
    while len(kept) < wanted and len(rounds) < tails.dynamic_rounds:
        if rounds:
            pause(run)
        groups, grading = _round(run, step, wanted - len(kept), seen)
        rounds.append(grading.complete(groups, run.config.privileged))
        for group in rounds[-1].groups:
            rewards = overlong.rewards(group)
            (equal if bool((rewards == rewards[0]).all()) else kept).append(group)
    missing = wanted - len(kept)
    batch = [*kept, *equal[:missing]]
    return batch, Settled(_together(rounds, batch, dropped=len(equal) - missing))


def _round(run: Run, step: int, wanted: int, seen: Counter[str]) -> tuple[list[RolloutGroup], EarlyGrading]:
    """`wanted` groups, of more problems than that where `tails.oversample` is above 1: the others are given up and come again in their next epoch."""
    problems = run.sampler.next(run.config.problems_drawn(wanted))
    size, longest_first = run.config.rollout.group_size, run.config.tails.schedule == "longest_first"
    with EarlyGrading(run.grader, problems, size, run.decode) as grading:
        groups = generate_groups(
            run.engine, problems, [run.prompts.student_prompt(p) for p in problems], sampling=run.sampling, group_size=size,
            seed=run.config.run.seed, step=step, decode=run.decode, finished=grading, seen=seen,
            quota=wanted if len(problems) > wanted else None, expected=run.lengths.known() if longest_first else None)
    grading.keep([number for number, group in enumerate(groups) if group is not None])
    complete = [group for group in groups if group is not None]
    if longest_first:
        run.lengths.learn(complete)
    return complete, grading


def _together(rounds: Sequence[GradedGroups], batch: Sequence[RolloutGroup], *, dropped: int) -> GradedGroups:
    """One report of several rounds; answers of groups that left the batch count among time-outs and crashes."""
    hidden = [each.hidden_seconds for each in rounds if each.hidden_seconds is not None]
    return replace(
        rounds[0], groups=tuple(batch), timeouts=sum(r.timeouts for r in rounds), crashes=sum(r.crashes for r in rounds),
        rebuilds=sum(r.rebuilds for r in rounds), hidden_seconds=sum(hidden) if hidden else None, given_up=sum(r.given_up for r in rounds),
        rounds=len(rounds), dropped=dropped)
