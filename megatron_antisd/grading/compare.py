"""Is what a program gave what the test expects? Decided outside of the sandbox, on plain values."""

from __future__ import annotations

import math
from typing import Any

from megatron_antisd.grading.encoding import Opaque, distinct
from megatron_antisd.grading.extraction import split_lines

RELATIVE_TOLERANCE = 1e-7
"""Beside an absolute tolerance, as NumPy's `assert_allclose` and EvalPlus have it."""

MAX_NUMBER_CHARACTERS = 1000

COMPARISONS = ("equal", "unordered", "not_none")


def matches(output: Any, expected: Any, compare: str, tolerance: float) -> bool:
    """Whether a returned value passes. `compare` is one of COMPARISONS, see `CodeTests.compare`.

    Equality is Python's `==`, so `True == 1 == 1.0` but a list is not a tuple; NaN equals NaN. A tolerance above 0 also lets floats
    differ, inside of collections too, when the outermost types are the same.
    """
    if compare == "not_none":
        present = output if isinstance(output, bool) else output is not None
        return present == expected
    if isinstance(output, Opaque):
        return False
    if compare == "unordered":
        try:
            return set(distinct(output)) == set(expected)
        except (TypeError, ValueError):  # no collection, members without a hash, or hashes that collide on purpose
            return False
    if output == expected:
        return True
    return _close(output, expected, tolerance if type(output) is type(expected) else 0.0)


def same_text(output: str, expected: str, tolerance: float) -> bool:
    """Whether a program's standard output passes: white space at the end of lines and empty lines at the end do not count.

    With a tolerance above 0 the outputs are compared token by token, and tokens that are both numbers may differ by it.
    """
    if _lines(output) == _lines(expected):
        return True
    if tolerance <= 0:
        return False
    left, right = output.split(), expected.split()
    return len(left) == len(right) and all(a == b or _close_tokens(a, b, tolerance) for a, b in zip(left, right, strict=True))


def _lines(text: str) -> list[str]:
    return "\n".join(line.rstrip() for line in split_lines(text)).rstrip("\n").split("\n")


def _close_tokens(output: str, expected: str, tolerance: float) -> bool:
    if "_" in output + expected or max(len(output), len(expected)) > MAX_NUMBER_CHARACTERS:  # float() takes 1_0 for 10
        return False
    try:
        return _near(float(output), float(expected), tolerance)
    except ValueError:
        return False


def _close(output: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(output, int | float | complex) and isinstance(expected, int | float | complex):
        return output == expected or _both_nan(output, expected) or (tolerance > 0 and _near(output, expected, tolerance))
    if type(output) is not type(expected):
        return False
    if isinstance(output, list | tuple):
        return len(output) == len(expected) and all(_close(a, b, tolerance) for a, b in zip(output, expected, strict=True))
    if isinstance(output, dict):
        return output.keys() == expected.keys() and all(_close(output[key], expected[key], tolerance) for key in expected)
    return bool(output == expected)


def _both_nan(output: Any, expected: Any) -> bool:
    return output != output and expected != expected


def _near(output: Any, expected: Any, tolerance: float) -> bool:
    if isinstance(output, bool) or isinstance(expected, bool):
        return False
    try:
        if _both_nan(output, expected):
            return True
        distance = abs(output - expected)
        return math.isfinite(distance) and distance <= tolerance + RELATIVE_TOLERANCE * abs(expected)
    except OverflowError:  # an integer beyond the floats
        return False
