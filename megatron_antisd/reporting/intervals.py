"""Means with confidence intervals over repeated runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mpmath
import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    runs: int
    kind: str
    """`t` (one base model), `bootstrap` (several) or `single` (one run: there is no interval, low and high are None)."""


def estimate(values_by_base: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean over base models of each one's mean over seeds.

    One base: Student's t over its seeds. Several: runs that share a base are not independent, so bases are resampled first and then
    seeds within each (percentile bootstrap with a fixed seed). With two or three bases that interval is rough, and too narrow.
    """
    groups = [np.asarray(values, dtype=np.float64) for values in values_by_base.values()]
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError(f"every base needs at least one value, got {dict(values_by_base)}")
    runs = sum(len(group) for group in groups)
    mean = float(np.mean([group.mean() for group in groups]))
    if runs == 1:
        return Estimate(mean=mean, low=None, high=None, runs=1, kind="single")
    if len(groups) == 1:
        half = t_quantile(0.5 + LEVEL / 2, runs - 1) * float(groups[0].std(ddof=1)) / runs**0.5
        return Estimate(mean=mean, low=mean - half, high=mean + half, runs=runs, kind="t")
    low, high = np.quantile(_resampled_means(groups), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Estimate(mean=mean, low=float(low), high=float(high), runs=runs, kind="bootstrap")


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t for a probability above 1/2, from the regularised incomplete beta function (mpmath: torch brings it)."""
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"expected 0.5 < probability < 1 and degrees >= 1, got {probability} and {degrees}")

    # P(|T| > t) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2), rising in x: bisect for x.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if mpmath.betainc(degrees / 2, 0.5, 0, middle, regularized=True) < 2 * (1 - probability):
            low = middle
        else:
            high = middle
    return float(np.sqrt(degrees * (1 - high) / high))


def _resampled_means(groups: Sequence[np.ndarray]) -> np.ndarray:
    """[RESAMPLES]"""
    random = np.random.default_rng(0)
    total = np.zeros(RESAMPLES)
    for _ in groups:
        chosen = random.integers(len(groups), size=RESAMPLES)
        for index, group in enumerate(groups):
            rows = np.flatnonzero(chosen == index)
            total[rows] += group[random.integers(len(group), size=(len(rows), len(group)))].mean(axis=1)
    return total / len(groups)
