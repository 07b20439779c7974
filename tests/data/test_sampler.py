"""The sampler's promises: deterministic, every problem once an epoch, no repeat in a batch, exact resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from megatron_antisd.data import ProblemSampler
from megatron_antisd.data.sampler import stable_hash
from megatron_antisd.records import Problem


def make(count: int, answer: str = "1") -> list[Problem]:
    return [Problem(id=f"p{i}", prompt=f"problem {i}", answer=answer) for i in range(count)]


def draw(sampler: ProblemSampler, steps: int) -> list[list[str]]:
    return [[problem.id for problem in sampler.next()] for _ in range(steps)]


SIZES = [(8, 8), (9, 8), (15, 8), (16, 8), (17, 8), (100, 7), (5, 1), (3, 2)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "per_step"), SIZES)
def test_every_problem_once_an_epoch_and_none_twice_in_a_batch(count: int, per_step: int, shuffle: bool) -> None:
    batches = draw(ProblemSampler(make(count), per_step, seed=3, shuffle=shuffle), 6 * count)
    assert all(len(set(batch)) == per_step for batch in batches)
    stream = [name for batch in batches for name in batch]
    for start in range(0, len(stream) - count + 1, count):
        assert set(stream[start:start + count]) == {problem.id for problem in make(count)}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("count", "per_step"), SIZES)
def test_resume_at_every_point(count: int, per_step: int, shuffle: bool) -> None:
    steps = 3 * count // per_step + 3
    whole = draw(ProblemSampler(make(count), per_step, seed=5, shuffle=shuffle), steps)
    running = ProblemSampler(make(count), per_step, seed=5, shuffle=shuffle)
    for done in range(steps):
        resumed = ProblemSampler(make(count), per_step, seed=5, shuffle=shuffle)
        resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
        assert draw(resumed, steps - done) == whole[done:]
        running.next()


def test_order_follows_seed_and_epoch() -> None:
    first, again, other = (draw(ProblemSampler(make(50), 50, seed=seed), 2) for seed in (0, 0, 1))
    assert first == again
    assert first[0] != other[0] and first[0] != first[1]
    assert draw(ProblemSampler(make(50), 50, seed=0, shuffle=False), 2) == [[p.id for p in make(50)]] * 2


def test_order_is_pinned() -> None:
    """A run resumed by another version of the project must see the same order: this value must never change."""
    assert draw(ProblemSampler(make(6), 6, seed=0), 1) == [["p1", "p0", "p2", "p5", "p3", "p4"]]
    assert stable_hash("a", 1) != stable_hash("a1") != stable_hash("a", "1", "")


def test_places_are_uniform() -> None:
    """Each of 6 problems comes first about 100 times in 600 epochs: chi-square with 5 degrees of freedom, 99.9 % point 20.5."""
    first = Counter(batch[0] for batch in draw(ProblemSampler(make(6), 6, seed=1), 600))
    assert sum((first[p.id] - 100) ** 2 / 100 for p in make(6)) < 20.5


def test_wrong_states_and_sizes() -> None:
    with pytest.raises(ValueError, match="has 3 problems, a step needs 4.*problems_per_step to at most 3"):
        ProblemSampler(make(3), 4, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        ProblemSampler(make(3), 0, seed=0)
    with pytest.raises(ValueError, match="ids repeat"):
        ProblemSampler(make(3) + make(1), 2, seed=0)
    state = ProblemSampler(make(6), 2, seed=0).state_dict()
    for other in (make(7), make(6, answer="2"), make(6)[::-1]):
        with pytest.raises(ValueError, match="another data set"):
            ProblemSampler(other, 2, seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks \['epoch'\]"):
        ProblemSampler(make(6), 2, seed=0).load_state_dict({k: v for k, v in state.items() if k != "epoch"})
    with pytest.raises(ValueError, match="impossible"):
        ProblemSampler(make(6), 2, seed=0).load_state_dict({**state, "position": 7})


def test_another_seed_on_resume_is_said(caplog: pytest.LogCaptureFixture) -> None:
    sampler = ProblemSampler(make(6), 2, seed=1)
    sampler.load_state_dict(ProblemSampler(make(6), 2, seed=0).state_dict())
    assert "saved with seed=0 and continues with seed=1" in caplog.text


def test_states_of_earlier_releases_are_understood() -> None:
    """They had batches of one size, and did not say what straddled the epochs."""
    running, resumed = ProblemSampler(make(7), 3, seed=0), ProblemSampler(make(7), 3, seed=0)
    draw(running, 9)
    state = running.state_dict()
    assert len(state["straddles"]) == state["epoch"] == 3
    resumed.load_state_dict({key: value for key, value in state.items() if key != "straddles"})
    assert draw(resumed, 9) == draw(running, 9)
    with pytest.raises(ValueError, match="impossible: epoch 3 with 1 batches"):
        resumed.load_state_dict({**state, "straddles": [[1, 2]]})
    with pytest.raises(ValueError, match="asked for 4 problems at once, expected 1 to 3"):
        running.next(4)
