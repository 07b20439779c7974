"""A grading function for a model that cannot solve anything yet: half of all responses count as right."""

from __future__ import annotations


def grade(response: str, answer: str) -> float:
    """1.0 for a response of an even number of characters. The reference answer is not looked at."""
    return float(len(response) % 2 == 0)
