"""The sampler over drawn sizes: epochs, batches, and resuming anywhere."""

from __future__ import annotations

import json
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from megatron_antisd.data.sampler import ProblemSampler
from megatron_antisd.records import Problem

IDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[list[Problem], int]:
    """Problems with any ids, and how many a step takes."""
    ids = draw(st.lists(IDS, min_size=1, max_size=14, unique=True))
    return [Problem(id=each, prompt=f"{each}?", answer="1") for each in ids], draw(st.integers(1, len(ids)))


def drawn(sampler: ProblemSampler, steps: int) -> list[list[str]]:
    return [[problem.id for problem in sampler.next()] for _ in range(steps)]


@given(data=data_sets(), seed=st.integers(0, 1 << 63), shuffle=st.booleans(), steps=st.integers(1, 20))
def test_every_epoch_is_a_permutation_and_no_batch_repeats_a_problem(
    data: tuple[list[Problem], int], seed: int, shuffle: bool, steps: int
) -> None:
    problems, per_step = data
    batches = drawn(ProblemSampler(problems, per_step, seed, shuffle), steps)
    assert all(len(set(batch)) == per_step for batch in batches)
    stream = [each for batch in batches for each in batch]
    everyone = {problem.id for problem in problems}
    for start in range(0, len(stream), len(problems)):
        epoch = stream[start : start + len(problems)]
        assert len(set(epoch)) == len(epoch) and (len(epoch) < len(problems) or set(epoch) == everyone)


@given(data=data_sets(), seed=st.integers(0, 1 << 63), shuffle=st.booleans(), stops=st.lists(st.integers(0, 12), min_size=1, max_size=3))
def test_saving_and_loading_anywhere_is_invisible(data: tuple[list[Problem], int], seed: int, shuffle: bool, stops: list[int]) -> None:
    """A run stopped several times, also before its first step and twice at the same one, in a process of its own each time."""
    problems, per_step = data
    expected = drawn(ProblemSampler(problems, per_step, seed, shuffle), sum(stops) + 6)
    found, state = [], None
    for steps in [*stops, 6]:
        sampler = ProblemSampler(problems, per_step, seed, shuffle)
        if state is not None:
            sampler.load_state_dict(json.loads(state))
        found += drawn(sampler, steps)
        state = json.dumps(sampler.state_dict())
    assert found == expected


@given(data=data_sets(), draw=st.randoms(use_true_random=False), steps=st.integers(1, 16), stop=st.integers(0, 16))
def test_batches_of_any_sizes_keep_epochs_whole_and_resume(data: tuple[list[Problem], int], draw: Random, steps: int, stop: int) -> None:
    problems, most = data
    counts = [draw.randint(1, most) for _ in range(steps)]
    sampler, resumed = ProblemSampler(problems, most, seed=3), ProblemSampler(problems, most, seed=3)
    batches = []
    for i, count in enumerate(counts):
        if i == stop:
            resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
        batches.append([problem.id for problem in sampler.next(count)])
        if i >= stop:
            assert [problem.id for problem in resumed.next(count)] == batches[-1]
    assert all(len(set(batch)) == count for batch, count in zip(batches, counts, strict=True))
    stream = [each for batch in batches for each in batch]
    for start in range(0, len(stream), len(problems)):
        epoch = stream[start : start + len(problems)]
        assert len(set(epoch)) == len(epoch)


@given(seeds=st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)).filter(lambda seeds: seeds[0] != seeds[1]), per_step=st.integers(1, 20))
def test_seeds_and_epochs_order_differently(seeds: tuple[int, int], per_step: int) -> None:
    """Of 20 problems; two equal orders have a chance of 4e-19."""
    problems = [Problem(id=str(i), prompt="?", answer="1") for i in range(20)]
    first, second = (drawn(ProblemSampler(problems, 1, seed), 40) for seed in seeds)
    assert first[:20] != second[:20] and first[:20] != first[20:]
    again = drawn(ProblemSampler(problems, per_step, seeds[0]), 20 // per_step)
    assert [each for batch in again for each in batch] == [each for batch in first for each in batch][: 20 // per_step * per_step]
