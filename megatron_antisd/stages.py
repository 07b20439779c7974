"""The stages of one training step, each one call of the loop in `train.py`. Everything here is collective."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch

from megatron_antisd import batch as batching
from megatron_antisd import noise_floor
from megatron_antisd.algorithm import GateDecision
from megatron_antisd.drawing import Settled, draw
from megatron_antisd.grading.groups import EarlyGrading, GradedGroups
from megatron_antisd.health import refuses, strongest
from megatron_antisd.keeping import pause
from megatron_antisd.records import (
    NonFiniteScores,
    PrivilegedView,
    RolloutGroup,
    ScoredGroup,
    StepStats,
    TokenScores,
    TrainingBatch,
    UpdateFigures,
)
from megatron_antisd.rollout.probe import ProbeResult
from megatron_antisd.rollout.replay import load_rollouts, save_rollouts
from megatron_antisd.run import Run
from megatron_antisd.token_u import token_u_rows

_log = logging.getLogger(__name__)


def generate(run: Run, step: int) -> tuple[list[RolloutGroup], EarlyGrading | Settled | None]:
    """G rollouts of the next problems, and their grading, which begins with the first one that is done. Or an earlier run's graded ones
    (`debug.load_rollouts`; the sampler moves on all the same)."""
    if run.config.debug.load_rollouts is not None:
        run.sampler.next()
        return load_rollouts(run.config.debug.load_rollouts, step), None
    return draw(run, step)


def grade(run: Run, groups: Sequence[RolloutGroup], grading: EarlyGrading | Settled | None, step: int) -> GradedGroups:
    """Rewards and feedback, as far as they are not there yet; replayed rollouts keep theirs."""
    pause(run)
    if grading is None:
        return GradedGroups(groups=tuple(groups), timeouts=0, crashes=0)
    graded = grading.complete(groups, run.config.privileged)
    if run.config.debug.save_rollouts is not None and run.is_main:
        save_rollouts(run.config.debug.save_rollouts, step, graded.groups)
    return graded


def route(run: Run, graded: GradedGroups, step: int) -> GradedGroups:
    """The rollouts with the experts that the update will use (`routing.replay`)."""
    try:
        return dataclasses.replace(graded, groups=run.routing.prepare(graded.groups, step, run.trainer.score, run.engine.policy_version))
    except NonFiniteScores as error:
        run.incidents.append(run.health.of_scores(step, error, whose="student"))
        return graded


def score_teacher(run: Run, groups: Sequence[RolloutGroup], step: int) -> batching.TeacherScores:
    """The same weights on the privileged prompt: log-probs and exact entropies, no gradient."""
    pause(run)
    judge_batch(run, groups, step)
    lengths = [len(r.response_ids) for group in groups for r in group.rollouts]
    if not run.config.needs_teacher:
        return batching.no_teacher(lengths)
    views: list[PrivilegedView] = [v for group in groups for v in run.prompts.privileged_views(group, seed=run.config.run.seed, step=step)]
    views = run.routing.teacher_views(views, groups, run.engine.generate)
    scored = [v.view for v in views if v.view is not None]
    try:
        teacher = batching.lay_out_teacher(lengths, views, run.trainer.score(scored) if scored else None)
        return _with_empty_context(run, groups, teacher) if run.floor.pending else teacher
    except NonFiniteScores as error:
        run.incidents.append(run.health.of_scores(step, error))
        return batching.no_teacher(lengths)


def _with_empty_context(run: Run, groups: Sequence[RolloutGroup], teacher: batching.TeacherScores) -> batching.TeacherScores:
    """Until the noise floor is known: the teacher without privileged context, which is the student. Of the first update that will be made."""
    first = noise_floor.first_rollouts(run.config, batching.first_part(groups, run.config.algorithm, batching.Overlong.of(run.config)))
    if not first:
        return teacher
    views = noise_floor.empty_context_views(run.routing, first, run.engine.generate)
    return dataclasses.replace(teacher, empty_context=run.trainer.score(views).log_prob)


def judge_batch(run: Run, groups: Sequence[RolloutGroup], step: int) -> None:
    """What a graded batch alone can show: a reward that collapsed, responses that no longer end."""
    seen = batching.rollout_figures(groups)
    run.incidents.extend(run.health.before_update(step, reward_mean=seen["reward_mean"], truncation_rate=seen["truncation_rate"]))


def score_student(run: Run, groups: Sequence[RolloutGroup], step: int) -> TokenScores | None:
    """On-policy, the training forward itself gives the student's log-probs; a pass of its own is paid only for several updates
    a batch, for importance weights of whole responses, and where the gate needs the student's entropy."""
    settings = run.config.algorithm
    gate_asks = _gated(run) and (run.config.gate.mode == "student" or settings.method == "no_teacher")
    needed = settings.updates_per_batch > 1 or _corrects_sequences(run) or gate_asks
    if not needed or run.routing.student is not None:
        return run.routing.student
    try:
        return run.trainer.score(batching.student_views(groups))
    except NonFiniteScores as error:
        run.incidents.append(run.health.of_scores(step, error, whose="student"))
        return None


def decide_gate(run: Run, teacher: batching.TeacherScores, student: TokenScores | None) -> GateDecision | None:
    """The gate on the batch's exact median entropy: the teacher's, or the student's where that is the mode or there is no teacher. None where scores
    were not finite: no update will be made of them."""
    if not _gated(run) or any(incident.kind == "non_finite" for incident in run.incidents):
        return None
    by_student = student is not None and (run.config.gate.mode == "student" or not run.config.needs_teacher)
    return run.gate.update(student.entropy_median if by_student else teacher.entropy_median)


def update(run: Run, groups: Sequence[RolloutGroup], teacher: batching.TeacherScores, student: TokenScores | None,
           lambda_: float, step: int) -> tuple[list[TrainingBatch], list[StepStats]]:
    """The policy updates of this batch (one, on-policy)."""
    settings = run.config.algorithm
    pause(run)
    run.engine.sleep()
    refused = refuses(run.incidents)

    def accept(figures: UpdateFigures) -> bool:
        floor = noise_floor.judge(run.config, step, figures) if run.floor.pending else []
        if run.floor.pending and figures.noise_floor_mean is not None:
            run.floor.pending = False
            if run.resumed:  # the row of a resumed run is that of the run that was never interrupted
                _log.info("step %d: the noise floor of u, measured anew: %.3g nats on average, %.3g at most", step, figures.noise_floor_mean,
                          figures.noise_floor_max)
        found = [*run.health.of_update(step, figures), *floor]
        run.incidents.extend(found)
        return not (refused or refuses(found))

    old = student if settings.updates_per_batch > 1 else None
    ratio = batching.response_log_ratio(groups, student) if student is not None and _corrects_sequences(run) else None
    batches = batching.make_batches(groups, teacher, old, lambda_, settings, overlong=batching.Overlong.of(run.config), log_ratio=ratio)
    stats: list[StepStats] = []
    for part in batches:
        if stats and strongest(run.incidents) in ("stop", "rollback"):
            break  # what is left of this batch would be undone, or never used
        stats.append(run.trainer.step(part, learning_rate(run, step), accept=accept))
    run.progress.step = step
    run.progress.policy_version += sum(not s.skipped for s in stats)
    for one in stats:
        run.progress.skipped += one.skipped
        run.progress.skipped_in_a_row = run.progress.skipped_in_a_row + 1 if one.skipped else 0
    return batches, stats


def sync(run: Run, stats: Sequence[StepStats]) -> ProbeResult | None:
    """The engine gets the new policy and proves that it holds it; nothing to do when no update was applied and the engine still has its weights."""
    if all(s.skipped for s in stats) and not run.engine.asleep:
        return None
    proof = run.sync()
    if run.ahead is not None:
        run.ahead.go_on()
    return proof


def figures(run: Run, graded: GradedGroups, teacher: batching.TeacherScores, gate: GateDecision | None, lambda_: float,
            batches: Sequence[TrainingBatch], stats: Sequence[StepStats], probe: ProbeResult | None) -> dict[str, Any]:
    """The step's row of metrics.jsonl, times aside."""
    student = student_log_prob(run, batches, stats)
    return {
        **batching.rollout_figures(graded.groups),
        **batching.u_figures(teacher, student),
        **batching.update_figures(stats, [b.tokens for b in batches[: len(stats)]]),
        **run.routing.figures(stats, student),
        "teacher_entropy_median": teacher.entropy_median,
        "gate_open": gate and gate.open, "gate_warm": gate and gate.warm, "gate_down": gate and gate.down,
        "gate_entropy": gate and gate.entropy, "gate_marginal": gate and gate.marginal,
        "lambda": lambda_, "shadow_lambda": gate.lambda_ if gate is not None and run.config.algorithm.shadow else None,
        "teacher_masked_rollouts": teacher.missing, "seconds_hidden_grade": graded.hidden_seconds, **tail_figures(run, graded),
        **({} if run.ahead is None else run.ahead.figures(graded.groups, student)),
        "grader_timeouts": graded.timeouts, "grader_crashes": graded.crashes,
        "engine_memory_awake": run.engine.memory and run.engine.memory.awake, "engine_memory_asleep": run.engine.memory and run.engine.memory.asleep,
        **run.engine.take_figures(), "grader_rebuilds": graded.rebuilds,
        "learning_rate": learning_rate(run, run.progress.step), "policy_version": run.progress.policy_version,
        "probe_mean": probe and probe.mean, "probe_max": probe and probe.max,
        "audit_alarms": audit(run, graded.groups, teacher, student, run.progress.step),
        **(dict.fromkeys(batching.NOISE_FLOOR) if run.resumed else {}),
    }


def tail_figures(run: Run, graded: GradedGroups) -> dict[str, int | None]:
    """What the options of `tails` did; None where they are off."""
    tails = run.config.tails
    return {"groups_given_up": graded.given_up if tails.oversample > 1 else None,
            "generation_rounds": graded.rounds if tails.dynamic_sampling else None,
            "groups_dropped": graded.dropped if tails.dynamic_sampling else None,
            "overlong_rollouts": batching.Overlong.of(run.config).touched(graded.groups)}


def student_log_prob(run: Run, batches: Sequence[TrainingBatch], stats: Sequence[StepStats]) -> torch.Tensor | None:
    """[T] of the whole batch under the policy that sampled it: the training forward's own on-policy. None where a part of the batch was
    left out or the forward pass broke."""
    if len(stats) != run.config.algorithm.updates_per_batch:
        return None
    parts = [s.student.log_prob if b.old_log_prob is None else b.old_log_prob for b, s in zip(batches, stats, strict=True)]
    log_prob = torch.cat(parts)
    return log_prob if log_prob.isfinite().all() else None


def token_u(run: Run, groups: Sequence[RolloutGroup], teacher: batching.TeacherScores, batches: Sequence[TrainingBatch],
            stats: Sequence[StepStats]) -> list[dict[str, Any]]:
    """Mean u by kind of token; empty without a teacher."""
    log_prob = student_log_prob(run, batches, stats)
    if log_prob is None or not teacher.mask.any():
        return []
    return token_u_rows(groups, run.tokenizer, teacher.log_prob - log_prob, teacher.mask, run.config.logging.token_kinds)


def rollouts(run: Run, groups: Sequence[RolloutGroup], teacher: batching.TeacherScores, batches: Sequence[TrainingBatch],
             stats: Sequence[StepStats]) -> list[ScoredGroup]:
    """What is written of this step for the u-lens; empty without a teacher."""
    if not teacher.views:
        return []
    return batching.scored_groups(groups[: run.config.logging.rollout_groups], teacher, student_log_prob(run, batches, stats))


def audit(run: Run, groups: Sequence[RolloutGroup], teacher: batching.TeacherScores, student: torch.Tensor | None, step: int) -> int | None:
    """Defects and alarms of what the teachers of this step saw, found and said by the main rank; None without a teacher."""
    if run.watch is None or not teacher.views:
        return None
    u = [] if student is None or teacher.empty_context is None else (teacher.empty_context - student[: len(teacher.empty_context)]).tolist()
    return run.watch.check(step, batching.scored_groups(groups, teacher, student), u)


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up, then constant."""
    settings = run.config.optimizer
    return settings.lr * min(1.0, step / settings.warmup_steps) if settings.warmup_steps else settings.lr


def _gated(run: Run) -> bool:
    return run.config.algorithm.method != "grpo" or run.config.algorithm.shadow


def _corrects_sequences(run: Run) -> bool:
    return run.config.correction_mode != "off" and run.config.correction.level == "sequence"
