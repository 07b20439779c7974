"""Graded groups and scores -> training batches, gate signal and the step's figures. Plain tensors: every rank holds the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_antisd.algorithm import group_advantage, phi, sequence_log_ratio, soft_overlong_penalty
from megatron_antisd.config import AlgorithmConfig, RunConfig
from megatron_antisd.records import (
    PrivilegedView,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
    ScoringView,
    StepStats,
    TokenScores,
    TrainingBatch,
)

PHI_BOUND_U = -4.97
"""Below this u, phi is within 1 % of its lower bound: softplus(u) < 0.01 log 2."""

CORRECTION = ("correction_weight_mean", "correction_weight_max", "correction_weight_min", "correction_touched_share")
NOISE_FLOOR = ("noise_floor_mean", "noise_floor_max", "noise_floor_share")


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """The teacher's scores laid over all response tokens of the batch."""

    log_prob: torch.Tensor
    """[T] float32, NaN where there is no teacher."""
    mask: torch.Tensor
    """[T] bool."""
    entropy_median: float | None
    """Exact lower median of the entropies of the tokens under the mask; None where there is none."""
    missing: int | None
    """Rollouts without a teacher; None where no teacher was asked for."""
    views: tuple[PrivilegedView, ...] = ()
    """Of every rollout; empty where no teacher was asked for."""
    empty_context: torch.Tensor | None = None
    """[tokens of the first rollouts of `first_part`] log-probs without privileged context, until the noise floor is known: the teacher is then the
    student."""


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """What `tails.overlong` does with long responses; feedback, the shown solutions and all reward figures stay the grader's."""

    mode: Literal["off", "mask", "penalty"] = "off"
    limit: int = 0
    """`rollout.max_new_tokens`."""
    buffer: int = 0
    penalty: float = 0.0

    @staticmethod
    def of(config: RunConfig) -> Overlong:
        tails = config.tails
        return Overlong(mode=tails.overlong, limit=config.rollout.max_new_tokens, buffer=tails.overlong_buffer, penalty=tails.overlong_penalty)

    def rewards(self, group: RolloutGroup) -> torch.Tensor:
        """[G] float64 that A_seq is formed from."""
        rewards = group.rewards()
        return rewards + torch.tensor([self._added(r) for r in group.rollouts], dtype=torch.float64) if self.mode == "penalty" else rewards

    def keeps(self, rollout: Rollout) -> bool:
        """Whether its tokens are in the loss."""
        return not (self.mode == "mask" and rollout.truncated)

    def touched(self, groups: Sequence[RolloutGroup]) -> int | None:
        """Rollouts that are masked or penalised; None where neither is asked for."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return None if self.mode == "off" else sum(not self.keeps(r) or (self.mode == "penalty" and self._added(r) < 0) for r in rollouts)

    def _added(self, rollout: Rollout) -> float:
        return soft_overlong_penalty(len(rollout.response_ids), limit=self.limit, buffer=self.buffer, penalty=self.penalty)


def student_views(groups: Sequence[RolloutGroup]) -> tuple[ScoringView, ...]:
    """The plain prompt and the response of every rollout, and the experts that are given for them, in order."""
    return tuple(ScoringView(prompt_ids=r.prompt_ids, response_ids=r.response_ids, routes=r.routes) for group in groups for r in group.rollouts)


def lay_out_teacher(lengths: Sequence[int], views: Sequence[PrivilegedView], scores: TokenScores | None) -> TeacherScores:
    """Put the scores of the views that exist at their rollouts' tokens. `lengths` are all rollouts' response lengths.
    Raises ValueError when a view's response is not as long as its rollout's (invariant 1)."""
    expected = tuple(n for n, view in zip(lengths, views, strict=True) if view.view is not None)
    mask = torch.tensor([view.view is not None for view in views]).repeat_interleave(torch.tensor(lengths))
    log_prob = torch.full((sum(lengths),), float("nan"))
    missing = len(views) - len(expected)
    if scores is None:
        if expected:
            raise ValueError(f"{len(expected)} privileged views were not scored")
        return TeacherScores(log_prob=log_prob, mask=mask, entropy_median=None, missing=missing, views=tuple(views))
    if scores.lengths != expected:
        raise ValueError(f"teacher scores have response lengths {scores.lengths}, the rollouts {expected}")
    if not scores.log_prob.isfinite().all():
        broken = int((~scores.log_prob.isfinite()).nonzero()[0])
        raise ValueError(f"the teacher's log-prob of its response token {broken} of {len(scores.log_prob)} is {scores.log_prob[broken]}; "
                         "the weights or the logits are not finite")
    log_prob[mask] = scores.log_prob
    return TeacherScores(log_prob=log_prob, mask=mask, entropy_median=scores.entropy_median, missing=missing,
                         views=tuple(views))


def no_teacher(lengths: Sequence[int]) -> TeacherScores:
    """For methods without a teacher pass."""
    total = sum(lengths)
    return TeacherScores(log_prob=torch.full((total,), float("nan")), mask=torch.zeros(total, dtype=torch.bool), entropy_median=None, missing=None)


def _parts(groups: Sequence[RolloutGroup], settings: AlgorithmConfig) -> list[Sequence[RolloutGroup]]:
    """The groups of each update."""
    size = len(groups) // settings.updates_per_batch
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def _in_loss(group: RolloutGroup, rewards: torch.Tensor, settings: AlgorithmConfig, overlong: Overlong) -> list[bool]:
    """Of each rollout; `rewards`: those that A_seq is formed from."""
    dropped = settings.zero_variance == "drop" and bool((rewards == rewards[0]).all())
    return [not dropped and overlong.keeps(rollout) for rollout in group.rollouts]


def first_part(groups: Sequence[RolloutGroup], settings: AlgorithmConfig, overlong: Overlong) -> Sequence[RolloutGroup]:
    """The groups of the first of the batches that `make_batches` makes of these; empty where it makes none."""
    return next((part for part in _parts(groups, settings)
                 if any(any(_in_loss(group, overlong.rewards(group), settings, overlong)) for group in part)), ())


def make_batches(groups: Sequence[RolloutGroup], teacher: TeacherScores, old: TokenScores | None, lambda_: float, settings: AlgorithmConfig,
                 *, overlong: Overlong | None = None, log_ratio: torch.Tensor | None = None) -> list[TrainingBatch]:
    """One batch per update (`algorithm.updates_per_batch`), groups kept whole. A part in which nothing is left to learn from
    (all its rollouts dropped or masked) is left out. `log_ratio` [T]: see TrainingBatch.correction_log_ratio."""
    overlong = overlong or Overlong()
    batches = []
    first_token = 0
    for part in _parts(groups, settings):
        views = student_views(part)
        lengths = [len(view.response_ids) for view in views]
        tokens = slice(first_token, first_token + sum(lengths))
        advantages, keep = [], []
        for group in part:
            rewards = overlong.rewards(group)
            advantages.append(group_advantage(rewards, std=settings.std).float())
            keep += _in_loss(group, rewards, settings, overlong)
        if any(keep):
            batches.append(TrainingBatch(
                views=views, sequence_advantage=torch.cat(advantages), sequence_mask=torch.tensor(keep),
                teacher_log_prob=teacher.log_prob[tokens], teacher_mask=teacher.mask[tokens],
                old_log_prob=None if old is None else old.log_prob[tokens],
                engine_log_prob=torch.tensor([p for group in part for r in group.rollouts for p in r.engine_log_probs]),
                lambda_=lambda_, tokens=sum(n for n, kept in zip(lengths, keep, strict=True) if kept),
                correction_log_ratio=None if log_ratio is None else log_ratio[tokens],
                empty_context_log_prob=None if batches else teacher.empty_context))
        first_token = tokens.stop
    return batches


def response_log_ratio(groups: Sequence[RolloutGroup], student: TokenScores) -> torch.Tensor:
    """[T] log(trainer / engine probability) of each token's whole response, from a scoring pass at the weights that train."""
    engine = torch.tensor([p for group in groups for r in group.rollouts for p in r.engine_log_probs])
    return sequence_log_ratio(student.log_prob - engine, student.lengths)


def scored_groups(groups: Sequence[RolloutGroup], teacher: TeacherScores, student_log_prob: torch.Tensor | None) -> list[ScoredGroup]:
    """The first groups of the batch (`groups`) with what the teacher saw and both log-probs of every token; `student_log_prob` [T] of the
    whole batch. Needs a teacher that was asked."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    total = sum(lengths)
    teachers = teacher.log_prob[:total].split(lengths)
    students = [None] * len(lengths) if student_log_prob is None else student_log_prob[:total].split(lengths)
    scored = iter([
        ScoredRollout(rollout=rollout, privileged=view, student_log_prob=None if s is None else tuple(s.tolist()),
                      teacher_log_prob=None if view.view is None else tuple(t.tolist()))
        for rollout, view, t, s in zip(rollouts, teacher.views[: len(rollouts)], teachers, students, strict=True)])
    return [ScoredGroup(problem=group.problem, rollouts=tuple(next(scored) for _ in group.rollouts)) for group in groups]


def rollout_figures(groups: Sequence[RolloutGroup]) -> dict[str, float | int | None]:
    """Rewards, lengths and counts of a batch."""
    rollouts = [r for group in groups for r in group.rollouts]
    rewards = torch.cat([group.rewards() for group in groups])
    completed = torch.tensor([not r.truncated for r in rollouts])
    tokens = sum(len(r.response_ids) for r in rollouts)
    flat = [bool((g.rewards() == g.rewards()[0]).all()) for g in groups]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_completed_mean": float(rewards[completed].mean()) if completed.any() else None,
        "response_length_mean": tokens / len(rollouts),
        "truncation_rate": 1.0 - float(completed.double().mean()),
        "zero_variance_groups": sum(flat),
        "tokens": tokens,
    }


def u_figures(teacher: TeacherScores, student_log_prob: torch.Tensor | None) -> dict[str, float | None]:
    """u = teacher - student log-prob over tokens that have a teacher; None where there are none or where
    log-probs are not finite."""
    names = ("u_mean", "u_negative_share", "phi_bound_share", "phi_mean", "u_p01", "u_p10", "u_p50", "u_p90", "u_p99")
    if student_log_prob is None or not teacher.mask.any():
        return dict.fromkeys(names)
    u = (teacher.log_prob - student_log_prob)[teacher.mask].double()
    if not u.isfinite().all():
        return dict.fromkeys(names)  # a skipped update's forward pass has no value to report
    ranks = [min(int(q * u.numel()), u.numel() - 1) for q in (0.01, 0.1, 0.5, 0.9, 0.99)]
    quantiles = u.sort().values[ranks].tolist()
    figures = (float(u.mean()), float((u < 0).double().mean()), float((u < PHI_BOUND_U).double().mean()), float(phi(u).mean()), *quantiles)
    return dict(zip(names, figures, strict=True))


def update_figures(stats: Sequence[StepStats], tokens: Sequence[int]) -> dict[str, float | int | None]:
    """The figures of a step's updates: means weighted by tokens, the largest of maxima; None when no update was made."""
    means = ("loss", "grad_norm", "clip_fraction", "student_entropy_mean", "mismatch_kl", "mismatch_mean", "padding_share")
    skipped = sum(s.skipped for s in stats)
    if not stats:
        return dict.fromkeys((*means, "mismatch_max", *CORRECTION, *NOISE_FLOOR)) | {"updates_skipped": skipped}
    figures: dict[str, float | int | None] = {}
    for name in means:
        value = sum(getattr(s, name) * n for s, n in zip(stats, tokens, strict=True)) / sum(tokens)
        figures[name] = value if torch.isfinite(torch.tensor(value)) else None  # a skipped update's loss has no value to report
    largest = torch.tensor([s.mismatch_max for s in stats], dtype=torch.float64).max()  # Python's max passes over a NaN
    return figures | {"mismatch_max": float(largest) if largest.isfinite() else None, "updates_skipped": skipped,
                      **_correction_figures(stats, tokens), **{name: getattr(stats[0], name) for name in NOISE_FLOOR}}


def _correction_figures(stats: Sequence[StepStats], tokens: Sequence[int]) -> dict[str, float | None]:
    """Of the importance weights of all updates; None where they were off or an update's were not finite."""
    if any(s.correction_weight_mean is None for s in stats):
        return dict.fromkeys(CORRECTION)
    mean, share = (sum(getattr(s, name) * n for s, n in zip(stats, tokens, strict=True)) / sum(tokens) for name in (CORRECTION[0], CORRECTION[3]))
    return dict(zip(CORRECTION, (mean, max(s.correction_weight_max for s in stats), min(s.correction_weight_min for s in stats), share), strict=True))
