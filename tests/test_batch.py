"""Groups and scores -> training batches and figures, against plain loops and numpy."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_antisd import batch as batching
from megatron_antisd.config import AlgorithmConfig
from megatron_antisd.records import PrivilegedView, Problem, Rollout, RolloutGroup, ScoringView, StepStats, TokenScores


def make_group(name: str, rewards: list[float], seed: int, truncated: tuple[int, ...] = ()) -> RolloutGroup:
    generator = random.Random(seed)
    rollouts = []
    for index, reward in enumerate(rewards):
        length = generator.randint(1, 6)
        rollouts.append(Rollout(
            problem_id=name, index=index, prompt_ids=(1, 2, 3), response_ids=tuple(generator.randrange(9) for _ in range(length)),
            engine_log_probs=tuple(-generator.random() for _ in range(length)), truncated=index in truncated, policy_version=0,
            reward=reward, feedback="f"))
    return RolloutGroup(problem=Problem(id=name, prompt=name, answer="1"), rollouts=tuple(rollouts))


@pytest.fixture
def groups() -> list[RolloutGroup]:
    """Four groups of three: mixed, all wrong, mixed, all right."""
    return [make_group("a", [1, 0, 0], 1, truncated=(2,)), make_group("b", [0, 0, 0], 2), make_group("c", [1, 1, 0], 3),
            make_group("d", [1, 1, 1], 4, truncated=(0, 1))]


def lengths_of(groups: list[RolloutGroup]) -> list[int]:
    return [len(r.response_ids) for group in groups for r in group.rollouts]


def scores_of(lengths: list[int], seed: int = 0) -> TokenScores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, sum(lengths), generator=generator)
    return TokenScores(log_prob=-values[0], entropy_median=float(values[1].median()), lengths=tuple(lengths))


def teacher_of(groups: list[RolloutGroup], without: tuple[int, ...] = ()) -> batching.TeacherScores:
    lengths = lengths_of(groups)
    views = privileged(groups, without)
    return batching.lay_out_teacher(lengths, views, scores_of([n for i, n in enumerate(lengths) if i not in without], seed=5))


def privileged(groups: list[RolloutGroup], without: tuple[int, ...] = ()) -> list[PrivilegedView]:
    rollouts = [r for group in groups for r in group.rollouts]
    return [PrivilegedView(view=None, source="no_solution") if i in without else
            PrivilegedView(view=ScoringView(prompt_ids=(7,), response_ids=r.response_ids), source="peer", shown_index=0)
            for i, r in enumerate(rollouts)]


# -- batches ------------------------------------------------------------------------------------------------------------------


def test_one_batch_holds_everything_in_order(groups: list[RolloutGroup]) -> None:
    teacher = teacher_of(groups, without=(1,))
    (batch,) = batching.make_batches(groups, teacher, None, 0.5, AlgorithmConfig())
    rollouts = [r for group in groups for r in group.rollouts]
    assert batch.views == tuple(ScoringView(prompt_ids=r.prompt_ids, response_ids=r.response_ids) for r in rollouts)
    assert batch.engine_log_prob.tolist() == pytest.approx([p for r in rollouts for p in r.engine_log_probs])
    assert batch.lambda_ == 0.5 and batch.old_log_prob is None
    assert batch.sequence_mask.tolist() == [True] * 12 and batch.tokens == sum(lengths_of(groups))
    for name in ("log_prob", "mask"):
        assert torch.equal(getattr(batch, f"teacher_{name}").nan_to_num(), getattr(teacher, name).nan_to_num())
    assert batch.sequence_advantage.dtype == torch.float32
    for start in range(0, 12, 3):
        rewards = np.array([r.reward for r in rollouts[start : start + 3]])
        spread = rewards.std(ddof=1)
        expected = (rewards - rewards.mean()) / (spread + 1e-6) if spread else np.zeros(3)
        assert batch.sequence_advantage[start : start + 3].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert batch.sequence_advantage[3:6].tolist() == [0.0] * 3, "exactly 0 where all rewards are equal"


def test_flat_groups_are_kept_or_dropped(groups: list[RolloutGroup]) -> None:
    (kept,) = batching.make_batches(groups, teacher_of(groups), None, 0.5, AlgorithmConfig(zero_variance="keep"))
    (dropped,) = batching.make_batches(groups, teacher_of(groups), None, 0.5, AlgorithmConfig(zero_variance="drop"))
    assert kept.sequence_mask.all()
    assert dropped.sequence_mask.tolist() == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    lengths = lengths_of(groups)
    assert dropped.tokens == sum(lengths[:3]) + sum(lengths[6:9]), "the denominator counts tokens in the loss only"
    assert dropped.views == kept.views, "dropped rollouts still pass through the model: their figures are wanted"


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_updates_share_out_whole_groups(groups: list[RolloutGroup], updates: int) -> None:
    teacher, old = teacher_of(groups), scores_of(lengths_of(groups), seed=9)
    (whole,) = batching.make_batches(groups, teacher, old, 0.25, AlgorithmConfig())
    parts = batching.make_batches(groups, teacher, old, 0.25, AlgorithmConfig(updates_per_batch=updates))
    assert len(parts) == updates
    assert all(len(part.views) == 12 // updates for part in parts)
    assert sum((part.views for part in parts), ()) == whole.views
    for name in ("sequence_advantage", "sequence_mask", "teacher_log_prob", "teacher_mask", "old_log_prob", "engine_log_prob"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert sum(part.tokens for part in parts) == whole.tokens
    assert [part.tokens for part in parts] == [sum(part.lengths) for part in parts]
    assert all(part.old_log_prob.numel() == sum(part.lengths) for part in parts)


def test_a_part_without_anything_to_learn_is_left_out(groups: list[RolloutGroup]) -> None:
    settings = AlgorithmConfig(updates_per_batch=4, zero_variance="drop")
    parts = batching.make_batches(groups, teacher_of(groups), scores_of(lengths_of(groups)), 0.5, settings)
    assert [part.views[0].response_ids for part in parts] == [groups[0].rollouts[0].response_ids, groups[2].rollouts[0].response_ids]
    (last,) = parts[1:]
    old = scores_of(lengths_of(groups)).log_prob
    start = sum(lengths_of(groups[:2]))
    assert torch.equal(last.old_log_prob, old[start : start + sum(last.lengths)]), "the tokens of the part left out are passed over"
    flat, drop = [groups[1], groups[3]], AlgorithmConfig(zero_variance="drop")
    assert batching.make_batches(flat, teacher_of(flat), None, 0.0, drop) == []
    assert batching.first_part(flat, drop, batching.Overlong()) == ()


def test_the_noise_floor_is_taken_on_the_first_part_that_is_kept(groups: list[RolloutGroup]) -> None:
    settings, order = AlgorithmConfig(updates_per_batch=4, zero_variance="drop"), [groups[1], groups[0], groups[2], groups[3]]
    assert batching.first_part(order, settings, batching.Overlong()) == [groups[0]]
    empty = torch.zeros(sum(lengths_of([groups[0]])))
    first, second = batching.make_batches(order, replace(teacher_of(order), empty_context=empty), scores_of(lengths_of(order)), 0.5, settings)
    assert first.empty_context_log_prob is empty and len(empty) == sum(first.lengths) and second.empty_context_log_prob is None
    assert batching.first_part(groups, AlgorithmConfig(updates_per_batch=2), batching.Overlong()) == groups[:2]
    assert batching.first_part([groups[3]], AlgorithmConfig(), batching.Overlong(mode="mask")) == [groups[3]], "one response is in the loss"


def test_overlong_responses_are_masked_or_pay(groups: list[RolloutGroup]) -> None:
    """Truncated are rollout 2 of group a, and 0 and 1 of group d."""
    (plain,) = batching.make_batches(groups, teacher_of(groups), None, 0.5, AlgorithmConfig())
    mask = batching.Overlong(mode="mask")
    (masked,) = batching.make_batches(groups, teacher_of(groups), None, 0.5, AlgorithmConfig(), overlong=mask)
    assert [i for i, kept in enumerate(masked.sequence_mask.tolist()) if not kept] == [2, 9, 10] and mask.touched(groups) == 3
    assert masked.tokens == plain.tokens - sum(lengths_of(groups)[i] for i in (2, 9, 10))
    assert torch.equal(masked.sequence_advantage, plain.sequence_advantage), "they stay in the group's statistics"
    penalty = batching.Overlong(mode="penalty", limit=6, buffer=4, penalty=0.5)
    (paid,) = batching.make_batches(groups, teacher_of(groups), None, 0.5, AlgorithmConfig(), overlong=penalty)
    for number, group in enumerate(groups):
        shaped = np.array([r.reward - 0.5 * max(0.0, (len(r.response_ids) - 2) / 4) for r in group.rollouts])
        expected = (shaped - shaped.mean()) / (shaped.std(ddof=1) + 1e-6) if shaped.std() else np.zeros(3)
        assert paid.sequence_advantage[3 * number : 3 * number + 3].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert paid.sequence_mask.all() and penalty.touched(groups) == sum(n > 2 for n in lengths_of(groups))
    assert batching.Overlong().touched(groups) is None


def test_ratios_of_responses_and_the_empty_context_go_to_their_updates(groups: list[RolloutGroup]) -> None:
    lengths, student = lengths_of(groups), scores_of(lengths_of(groups))
    ratio = batching.response_log_ratio(groups, student)
    engine = [p for group in groups for r in group.rollouts for p in r.engine_log_probs]
    sums = [float(part.sum()) for part in (student.log_prob - torch.tensor(engine)).split(lengths)]
    assert ratio.tolist() == pytest.approx([total for total, n in zip(sums, lengths, strict=True) for _ in range(n)], abs=1e-6)
    teacher = replace(teacher_of(groups), empty_context=torch.zeros(sum(lengths[:2])))
    first, second = batching.make_batches(groups, teacher, student, 0.5, AlgorithmConfig(updates_per_batch=2), log_ratio=ratio)
    assert torch.equal(torch.cat([first.correction_log_ratio, second.correction_log_ratio]), ratio)
    assert len(first.empty_context_log_prob) == sum(lengths[:2]) and second.empty_context_log_prob is None


def test_ungraded_groups_are_refused(groups: list[RolloutGroup]) -> None:
    bare = replace(groups[1], rollouts=tuple(replace(r, reward=None) for r in groups[1].rollouts))
    with pytest.raises(ValueError, match=r"rollouts \[0, 1, 2\] of problem 'b' have no reward"):
        batching.make_batches([groups[0], bare], teacher_of(groups[:2]), None, 0.0, AlgorithmConfig())


# -- the teacher's scores -----------------------------------------------------------------------------------------------------


def test_teacher_scores_stand_at_their_rollouts_tokens(groups: list[RolloutGroup]) -> None:
    without = (0, 4, 11)
    lengths = lengths_of(groups)
    scores = scores_of([n for i, n in enumerate(lengths) if i not in without], seed=5)
    laid = batching.lay_out_teacher(lengths, privileged(groups, without), scores)
    assert laid.missing == 3 and laid.entropy_median == scores.entropy_median
    source, position = iter(scores.log_prob.tolist()), 0
    for i, length in enumerate(lengths):
        for _ in range(length):
            if i in without:
                assert not laid.mask[position] and math.isnan(laid.log_prob[position])
            else:
                assert laid.mask[position] and laid.log_prob[position].item() == next(source)
            position += 1
    assert position == len(laid.mask) == len(laid.log_prob) and next(source, None) is None


def test_no_teacher_anywhere(groups: list[RolloutGroup]) -> None:
    lengths = lengths_of(groups)
    laid = batching.lay_out_teacher(lengths, privileged(groups, tuple(range(12))), None)
    assert laid.missing == 12 and not laid.mask.any() and laid.log_prob.isnan().all() and laid.entropy_median is None
    none = batching.no_teacher(lengths)
    assert none.missing is None and not none.mask.any() and none.log_prob.isnan().all()
    assert none.entropy_median is None


def test_teacher_scores_that_do_not_fit_are_refused(groups: list[RolloutGroup]) -> None:
    lengths = lengths_of(groups)
    with pytest.raises(ValueError, match="12 privileged views were not scored"):
        batching.lay_out_teacher(lengths, privileged(groups), None)
    with pytest.raises(ValueError, match="teacher scores have response lengths"):
        batching.lay_out_teacher(lengths, privileged(groups), scores_of([lengths[0] + 1, *lengths[1:]]))
    scores = scores_of(lengths)
    scores.log_prob[3] = float("-inf")
    with pytest.raises(ValueError, match=r"the teacher's log-prob of its response token 3 of \d+ is -inf"):
        batching.lay_out_teacher(lengths, privileged(groups), scores)
    with pytest.raises(ValueError, match="teacher scores have response lengths"):
        batching.lay_out_teacher(lengths, privileged(groups, without=(3,)), scores_of(lengths))
    with pytest.raises(ValueError):
        batching.lay_out_teacher(lengths[:-1], privileged(groups), scores_of(lengths))


# -- figures ------------------------------------------------------------------------------------------------------------------


def test_rollout_figures_against_numpy(groups: list[RolloutGroup]) -> None:
    rewards = np.array([r.reward for group in groups for r in group.rollouts])
    truncated = np.array([r.truncated for group in groups for r in group.rollouts])
    lengths = np.array(lengths_of(groups))
    figures = batching.rollout_figures(groups)
    assert figures == pytest.approx({
        "reward_mean": rewards.mean(), "reward_completed_mean": rewards[~truncated].mean(), "response_length_mean": lengths.mean(),
        "truncation_rate": truncated.mean(), "zero_variance_groups": 2, "tokens": lengths.sum()})


def test_rewards_of_completed_rollouts_need_one() -> None:
    group = make_group("a", [1, 0], 1, truncated=(0, 1))
    assert batching.rollout_figures([group])["reward_completed_mean"] is None


def test_phi_bound_is_where_softplus_falls_below_a_hundredth_of_log_2() -> None:
    def softplus(u: float) -> float:
        return math.log1p(math.exp(u))

    assert softplus(batching.PHI_BOUND_U) < 0.01 * math.log(2)
    assert softplus(batching.PHI_BOUND_U + 0.01) > 0.01 * math.log(2)


def test_u_figures_against_numpy(groups: list[RolloutGroup]) -> None:
    teacher = teacher_of(groups, without=(2, 6))
    teacher.log_prob[teacher.mask] *= 12  # some tokens at phi's bound
    student = scores_of(lengths_of(groups), seed=8).log_prob
    figures = batching.u_figures(teacher, student)
    u = (teacher.log_prob - student)[teacher.mask].double().numpy()
    expected = {
        "u_mean": u.mean(), "u_negative_share": (u < 0).mean(), "phi_bound_share": (np.log1p(np.exp(u)) < 0.01 * np.log(2)).mean(),
        "phi_mean": (0.5 * (np.log1p(np.exp(u)) - np.log(2))).mean(),
        **{f"u_p{round(100 * q):02d}": np.sort(u)[int(q * len(u))] for q in (0.01, 0.1, 0.5, 0.9, 0.99)}}
    assert figures == pytest.approx(expected, rel=1e-6)
    assert 0 < figures["phi_bound_share"] < 1


def test_u_figures_where_there_is_nothing_to_report(groups: list[RolloutGroup]) -> None:
    lengths = lengths_of(groups)
    student = scores_of(lengths).log_prob
    for figures in (batching.u_figures(batching.no_teacher(lengths), student), batching.u_figures(teacher_of(groups), None)):
        assert len(figures) == 9 and set(figures.values()) == {None}


def test_u_figures_of_a_broken_forward_pass_are_missing_not_nan(groups: list[RolloutGroup]) -> None:
    """A skipped update's log-probs may be NaN: the row of the metrics must still be written."""
    student = scores_of(lengths_of(groups)).log_prob
    student[3] = float("nan")
    assert set(batching.u_figures(teacher_of(groups), student).values()) == {None}


def stats(**changes: float) -> StepStats:
    values = dict(loss=1.0, grad_norm=2.0, skipped=False, clip_fraction=0.1, student_entropy_mean=0.5, mismatch_kl=0.01, mismatch_mean=0.02,
                  mismatch_max=0.3, padding_share=0.0)
    scores = TokenScores(log_prob=torch.zeros(1), entropy_median=None, lengths=(1,))
    return StepStats(**{**values, **changes}, student=scores)


def test_update_figures_are_weighted_by_tokens() -> None:
    figures = batching.update_figures([stats(), stats(loss=3.0, mismatch_max=0.7, clip_fraction=0.5)], [10, 30])
    assert figures["loss"] == pytest.approx(2.5) and figures["clip_fraction"] == pytest.approx(0.4)
    assert figures["mismatch_max"] == 0.7 and figures["updates_skipped"] == 0 and figures["grad_norm"] == 2.0


def test_update_figures_without_a_value() -> None:
    none = batching.update_figures([], [])
    assert none.pop("updates_skipped") == 0 and set(none.values()) == {None}
    nan = float("nan")
    broken = batching.update_figures([stats(), stats(loss=nan, grad_norm=float("inf"), mismatch_max=nan, skipped=True)], [1, 1])
    assert (broken["loss"], broken["grad_norm"], broken["mismatch_max"]) == (None, None, None)
    assert broken["updates_skipped"] == 1 and broken["student_entropy_mean"] == 0.5
