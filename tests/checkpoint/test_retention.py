"""Which checkpoints are kept, against the rule written out for each one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_antisd.checkpoint.retention import superseded
from megatron_antisd.config import CheckpointConfig


def test_the_newest_the_best_and_the_landmarks_stay() -> None:
    settings = CheckpointConfig(every=10, keep=2, keep_best=1, keep_every=40)
    scores = {10: 0.1, 20: 0.9, 30: 0.5, 60: 0.2}
    assert superseded([10, 20, 30, 40, 50, 60, 70], 70, scores, settings) == [10, 30, 50]
    assert superseded([10, 20], 20, {}, settings) == []
    assert superseded([10, 20, 30], 30, {10: 0.3, 20: 0.3}, CheckpointConfig(keep=1, keep_best=1)) == [10], "of equals the later one"
    assert superseded([10, 20, 30, 90], 30, {}, CheckpointConfig(keep=1)) == [10, 20], "a later step is another history's"


@given(steps=st.sets(st.integers(1, 60), min_size=1), keep=st.integers(1, 5), keep_best=st.integers(0, 4),
       keep_every=st.none() | st.integers(1, 20), scores=st.dictionaries(st.integers(1, 60), st.floats(0, 1)), data=st.data())
def test_the_rule_holds_for_each(steps: set[int], keep: int, keep_best: int, keep_every: int | None, scores: dict[int, float],
                                 data: st.DataObject) -> None:
    newest = data.draw(st.sampled_from(sorted(steps)))
    gone = set(superseded(steps, newest, scores, CheckpointConfig(keep=keep, keep_best=keep_best, keep_every=keep_every)))
    mine = {step for step in steps if step <= newest}
    for step in steps:
        better = [s for s in mine if s in scores and (scores[s], s) > (scores.get(step, -1.0), step)]
        wanted = (step > newest or sum(s > step for s in mine) < keep or (keep_every is not None and step % keep_every == 0)
                  or (step in scores and len(better) < keep_best))
        assert (step in gone) == (not wanted), step
