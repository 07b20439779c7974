"""What the u-lens shows of all tokens together: the heat map's bins, the extreme tokens, and both over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_antisd.reporting.u_lens_data import TokenValues

BINS = 80  # a side
LOG_FLOOR = -20.0  # nats; the first bin holds everything below it too
SHOWN_TOKENS = 20  # of each sign
MINIMUM_COUNT = 10
RANGE_QUANTILE = 0.98
SMALLEST_RANGE, DEFAULT_RANGE = 0.1, 1.0


def heat_map(values: TokenValues, steps: Sequence[int], store: Callable[[np.ndarray], int]) -> dict[str, Any]:
    """Counts of (pi_S, pi_T) in BINS x BINS squares, [student bin, teacher bin], by probability and by log-prob, of all steps and of each.

    `store` keeps an array and returns its number.
    """
    probability, log = (np.ravel_multi_index((bins(values.student), bins(values.teacher)), (BINS, BINS))
                        for bins in (_probability_bins, _log_bins))
    result: dict[str, Any] = {"bins": BINS, "floor": LOG_FLOOR}
    for name, squares in (("probability", probability), ("log", log)):
        counts = [np.bincount(squares, minlength=BINS * BINS)]
        counts += [np.bincount(squares[values.step == step], minlength=BINS * BINS) for step in steps]
        result[name] = [store(each) for each in counts]
    return result


def _probability_bins(log_prob: np.ndarray) -> np.ndarray:
    """0 .. BINS - 1; a probability of 1 falls into the last."""
    return np.minimum((np.exp(np.minimum(log_prob, 0.0)) * BINS).astype(np.int64), BINS - 1)


def _log_bins(log_prob: np.ndarray) -> np.ndarray:
    return np.clip(((log_prob - LOG_FLOOR) / -LOG_FLOOR * BINS).astype(np.int64), 0, BINS - 1)


def over_steps(values: TokenValues, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Of each step: tokens, mean u, share of u < 0 and their standard errors, tokens taken as independent; None where there are too few."""
    rows, every = [], values.u
    for step in steps:
        u = every[values.step == step]
        rows.append({"step": step, "tokens": len(u), "mean": _mean(u), "error": _error(u),
                     "share": _mean((u < 0).astype(np.float64)), "shareError": _error((u < 0).astype(np.float64))})
    return rows


def extreme_tokens(values: TokenValues, steps: Sequence[int], minimum_count: int) -> dict[str, Any]:
    """The tokens of at least `minimum_count` occurrences with the lowest mean u (where it is below 0) and with the highest (above 0).

    Each row holds `token`, `count`, `mean`, `error` (standard error, occurrences taken as independent; None for one) and, one a step,
    `means` (None where the token does not occur) and `counts`.
    """
    ids, inverse = np.unique(values.token, return_inverse=True)
    u, count = values.u, np.bincount(inverse, minlength=len(ids))
    mean = np.bincount(inverse, weights=u, minlength=len(ids)) / count
    squares = np.bincount(inverse, weights=(u - mean[inverse]) ** 2, minlength=len(ids))
    order = np.argsort(mean, kind="stable")
    order = order[count[order] >= minimum_count]
    low = [place for place in order[:SHOWN_TOKENS] if mean[place] < 0]
    high = [place for place in order[::-1][:SHOWN_TOKENS] if mean[place] > 0]
    rows = {}
    for place in {*low, *high}:
        mine = np.flatnonzero(inverse == place)
        by_step = [u[mine[values.step[mine] == step]] for step in steps]
        error = None if count[place] < 2 else math.sqrt(squares[place] / (count[place] - 1) / count[place])
        rows[place] = {"token": int(ids[place]), "count": int(count[place]), "mean": float(mean[place]), "error": error,
                       "means": [_mean(u) for u in by_step], "counts": [len(u) for u in by_step]}
    return {"minimum": minimum_count, "negative": [rows[place] for place in low], "positive": [rows[place] for place in high]}


def colour_range(values: TokenValues) -> float:
    """Nats of |u| at which the colour is full: a high quantile, two digits."""
    size = np.abs(values.u)
    return max(SMALLEST_RANGE, float(f"{np.quantile(size, RANGE_QUANTILE):.2g}")) if len(size) else DEFAULT_RANGE


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
