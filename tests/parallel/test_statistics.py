"""Exact distributed statistics: on ranks against torch.sort, and alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distributed import run_ranks

from megatron_antisd.parallel.statistics import global_lower_median, global_max, global_mean, global_quantiles


def test_four_ranks_against_sort() -> None:
    assert "statistics agree" in run_ranks(Path(__file__).parent / "statistics_ranks.py", 4, timeout=120)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 100, 1001])
def test_one_rank_without_group(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    before = values.clone()
    ordered = values.sort().values
    assert global_lower_median(values, None) == ordered[(count - 1) // 2].item()
    assert global_quantiles(values, [1.0, 0.0, 0.5], None) == (
        ordered[-1].item(), ordered[0].item(), ordered[(count - 1) // 2].item(),
    )  # fmt: skip
    assert global_max(values, None) == ordered[-1].item()
    assert global_mean(values, None) == pytest.approx(values.double().mean().item(), abs=1e-14)
    assert torch.equal(values, before)


def test_nothing_is_none() -> None:
    empty = torch.zeros(0)
    assert global_lower_median(empty, None) is None and global_quantiles(empty, [0.5], None) is None
    assert global_mean(empty, None) is None and global_max(empty, None) is None
    assert global_quantiles(torch.ones(3), [], None) == ()


def test_median_is_never_an_average() -> None:
    assert global_lower_median(torch.tensor([4.0, 1.0, 3.0, 2.0]), None) == 2.0
    assert global_lower_median(torch.tensor([-1.0, -3.0]), None) == -3.0


def test_zeros_are_one_value() -> None:
    median = global_lower_median(torch.tensor([-0.0, 0.0, -0.0]), None)
    assert median == 0.0 and math.copysign(1.0, median) == 1.0


def test_quantile_counts_as_the_decimal_written() -> None:
    values = torch.arange(101, dtype=torch.float32)
    assert math.floor(0.29 * 100) == 28  # the trap
    assert global_quantiles(values, [0.29, 0.57, 0.58], None) == (29.0, 57.0, 58.0)


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="expected \\[n_local\\] torch.float32"):
        global_lower_median(torch.zeros(3, dtype=torch.float64), None)
    with pytest.raises(ValueError, match="expected \\[n_local\\] torch.float32"):
        global_mean(torch.zeros(3, 2), None)
    with pytest.raises(ValueError, match=r"quantiles \[1.5\] lie outside"):
        global_quantiles(torch.zeros(3), [0.5, 1.5], None)
    with pytest.raises(ValueError, match="1 of 2 values"):
        global_lower_median(torch.tensor([1.0, math.nan]), None)
    with pytest.raises(ValueError, match="2 of 2 values"):
        global_max(torch.tensor([math.inf, -math.inf]), None)
