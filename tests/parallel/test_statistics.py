"""The lower median of values on several ranks, bit by bit torch's median of everything, under any partition."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from statistics_cases import bitwise, expected, hard_values

from megatron_antisd.parallel.statistics import lower_median

SCRIPT = Path(__file__).with_name("statistics_ranks.py")


@pytest.mark.parametrize("name", hard_values())
def test_one_rank_against_torch(name: str) -> None:
    values = hard_values()[name]
    kept = values.clone()
    assert bitwise(lower_median(values, None)) == bitwise(expected(values))
    assert bitwise(lower_median(values.flip(0), None)) == bitwise(expected(values))
    assert torch.equal(values.view(torch.int32), kept.view(torch.int32)), "the values are left as they are"


def test_every_count_against_a_sorted_list() -> None:
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 200):
        values = torch.randint(-9, 9, (count,), generator=generator) / 4
        assert lower_median(values, None) == sorted(values.tolist())[(count - 1) // 2]


def test_nothing_and_what_is_no_number() -> None:
    assert lower_median(torch.empty(0), None) is None
    for bad in (float("nan"), float("inf"), float("-inf")):
        assert math.isnan(lower_median(torch.tensor([1.0, bad, 2.0]), None))
    with pytest.raises(TypeError, match=r"float32 values, got torch\.float64"):
        lower_median(torch.zeros(3, dtype=torch.float64), None)


def test_four_ranks_under_random_partitions() -> None:
    """statistics_ranks.py says what is checked: groups of 1, 2 and 4, empty ranks, one rank at fault, what is sent."""
    assert f"{3 * 6 * len(hard_values())} medians are torch's" in run_ranks(SCRIPT, 4)
