"""avg@k, unbiased pass@k, majority@k and their intervals, from graded samples. Pure: numbers in, numbers out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
BLOCK = 500
"""Resamples at once: their counts are [BLOCK, problems]."""


@dataclass(frozen=True, kw_only=True)
class GradedSample:
    """What the summary needs of one sample."""

    correct: bool
    truncated: bool
    tokens: int
    """Of the response."""
    answer: str | None
    """The final answer as written, for the majority vote; None where there is none (it abstains)."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples is correct, from n samples of which c are.

    1 - C(n-c, k) / C(n, k), the share of k-subsets with a correct sample (Chen et al., arXiv 2107.03374, section 2.1),
    as the product of (1 - k/i) over i = n-c+1 .. n: no binomial is formed, so large n neither overflows nor cancels.
    """
    for name, value in (("n", n), ("c", c), ("k", k)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"pass_at_k: {name} is {value!r}, expected an integer")
    if c < 0 or c > n:
        raise ValueError(f"pass_at_k: c = {c} correct of n = {n} samples, expected 0 <= c <= n")
    if k < 1 or k > n:
        raise ValueError(f"pass_at_k: k = {k} with n = {n} samples, expected 1 <= k <= n; draw at least k samples a problem")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority_at_k(samples: Sequence[GradedSample]) -> float:
    """Whether the most frequent answer of a problem's samples is correct: 0 or 1, or the correct share of answers that tie.

    All correct samples hold one answer, however written; wrong ones vote apart where they are written differently (white space aside).
    Samples without an answer abstain; where all do, the result is 0.
    """
    votes: Counter[tuple[bool, str]] = Counter()
    for sample in samples:
        if sample.correct:
            votes[True, ""] += 1
        elif sample.answer is not None:
            votes[False, "".join(sample.answer.split())] += 1
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [correct for (correct, _), count in votes.items() if count == most]
    return sum(winners) / len(winners)


def interval(per_problem: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap over problems of the means over problems: [problems, quantities] -> ([quantities], [quantities]).

    Problems are what a benchmark drew from some population; samples of one problem are not independent of each other. The resamples
    come from a fixed seed, so the same samples give the same interval.
    """
    random = np.random.default_rng(0)
    problems = len(per_problem)
    shares = np.full(problems, 1.0 / problems)
    means = np.concatenate([random.multinomial(problems, shares, size=BLOCK) @ per_problem for _ in range(RESAMPLES // BLOCK)]) / problems
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0)
    return low, high


def summarise(benchmark: str, samples: Sequence[Sequence[GradedSample]]) -> dict[str, float]:
    """The metrics of one evaluation from [problems][k] samples.

    Keys under `eval/<benchmark>/`: `avg@k` with `low@k` and `high@k`, `pass@j` with `pass_low@j` and `pass_high@j` for j = 1..k (all
    intervals absent for a single problem), `majority@k` (absent where no wrong or right sample names an answer, as with programs),
    `truncation_rate` and `response_length_mean` (tokens). Raises ValueError unless every problem has equally many samples, at least one.
    """
    sizes = {len(problem) for problem in samples}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"evaluation of {benchmark!r}: {len(samples)} problems with {sorted(sizes)} samples, expected problems with equally "
                         "many samples, at least one")
    k, flat = sizes.pop(), [sample for problem in samples for sample in problem]
    counts = [sum(sample.correct for sample in problem) for problem in samples]
    passes = np.array([[pass_at_k(k, c, j) for j in range(1, k + 1)] for c in counts])
    prefix = f"eval/{benchmark}"
    metrics = {f"{prefix}/avg@{k}": sum(counts) / (k * len(samples))}
    means = passes.mean(axis=0)
    metrics |= {f"{prefix}/pass@{j + 1}": _fraction(means[j]) for j in range(k)}
    if len(samples) > 1:
        low, high = interval(np.column_stack([np.array(counts) / k, passes]))
        metrics |= {f"{prefix}/low@{k}": _fraction(low[0]), f"{prefix}/high@{k}": _fraction(high[0])}
        metrics |= {f"{prefix}/pass_low@{j}": _fraction(low[j]) for j in range(1, k + 1)}
        metrics |= {f"{prefix}/pass_high@{j}": _fraction(high[j]) for j in range(1, k + 1)}
    if any(sample.answer is not None for sample in flat):
        metrics[f"{prefix}/majority@{k}"] = sum(map(majority_at_k, samples)) / len(samples)
    metrics[f"{prefix}/truncation_rate"] = sum(sample.truncated for sample in flat) / len(flat)
    metrics[f"{prefix}/response_length_mean"] = sum(sample.tokens for sample in flat) / len(flat)
    return metrics


def _fraction(value: float) -> float:
    """Within 0 and 1, which rounding of a mean of ones may leave by a last digit."""
    return min(1.0, max(0.0, float(value)))
