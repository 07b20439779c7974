"""Evaluation: samples of a benchmark's problems -> `eval/<benchmark>/...` metrics, fractions from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the share of correct samples; k, the number of samples, is the same for every problem."""
    samples = _samples("avg_at_k", correct)
    return sum(_count(problem) for problem in correct) / (len(correct) * samples)


def summarise(
    benchmark: str,
    correct: Sequence[Sequence[bool]],
    *,
    truncated: Sequence[Sequence[bool]],
    response_lengths: Sequence[Sequence[int]],
) -> dict[str, float]:
    """The metrics of one evaluation; all three arguments are [problems][samples], every problem with as many samples.

    Keys, with k = samples: `eval/<benchmark>/avg@k`, `pass@1`, `pass@2`, `pass@4`, ... and `pass@k`, `truncation_rate`
    and `response_length_mean` (tokens).
    """
    samples = _samples(f"evaluation of {benchmark!r}", correct)
    for name, values in (("truncated", truncated), ("response_lengths", response_lengths)):
        shape = [len(problem) for problem in values]
        if shape != [samples] * len(correct):
            raise ValueError(
                f"evaluation of {benchmark!r}: {name} has {shape} samples a problem, expected {samples} for each of {len(correct)} problems"
            )
    prefix = f"eval/{benchmark}"
    counts = [_count(problem) for problem in correct]
    metrics = {f"{prefix}/avg@{samples}": avg_at_k(correct)}
    for k in _ks(samples):
        metrics[f"{prefix}/pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
    total = len(correct) * samples
    metrics[f"{prefix}/truncation_rate"] = sum(_count(problem) for problem in truncated) / total
    metrics[f"{prefix}/response_length_mean"] = sum(sum(problem) for problem in response_lengths) / total
    return metrics


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, then `samples` itself."""
    return [1 << power for power in range((samples - 1).bit_length())] + [samples]


def _samples(what: str, correct: Sequence[Sequence[bool]]) -> int:
    """The number of samples a problem; raises unless there is at least one and it is the same for every problem."""
    sizes = {len(problem) for problem in correct}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{what}: {len(correct)} problems with {sorted(sizes)} samples, expected problems with equally many samples, at least one"
        )
    return sizes.pop()


def _count(problem: Sequence[bool]) -> int:
    """How many are true. A missing value or a fractional reward is an error, not "wrong"."""
    unknown = [value for value in problem if value not in (0, 1)]
    if unknown:
        raise ValueError(f"expected True or False (or 1.0 or 0.0) for each sample, got {unknown[0]!r}; decide what counts as correct first")
    return sum(map(bool, problem))
