"""What must agree between two answers before the parser's word is taken: brackets, number of elements, base, units, denial.

Math-Verify reads `[6, 31, -1]` and `(6, 31, -1)` as one tuple, `52_8` as 52 and `5 km` as 5. These rules only ever refuse.
"""

from __future__ import annotations

import re

from megatron_antisd.grading.exact import number
from megatron_antisd.grading.units import negated, units_conflict

MAX_DEPTH = 12
"""Brackets within brackets that are handed to the parser; its time grows exponentially with braces."""

_TOKEN = re.compile(r"\\[{}|]|\\(?:langle|rangle|begin|end)(?![A-Za-z])|\\[A-Za-z]+|\\.|[()\[\]{},;]")
_OPENING = {"(": "(", "[": "[", "{": "", r"\{": "{", r"\langle": "(", r"\begin": ""}
_CLOSING = {")": ")", "]": "]", "}": "", r"\}": "}", r"\rangle": ")", r"\end": ""}
_PREFIX = re.compile(r"^(?:\(?[A-Za-z_0-9{}, ]{1,20}\)?\s*(?:=|\\in(?![A-Za-z]))\s*)")
_BASED = re.compile(r"(?P<digits>[+-]?\s*[0-9A-F]+(?:\.[0-9A-F]+)?)\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*(?P<base>[a-z0-9]+)\s*\}?\s*\}|(?P<short>\d))")
_SPACED_NUMBERS = re.compile(r"(?<![\d._^])\d+\s+\d+(?!\s*[/\d.]*/)(?![\d.]*\s*[/}])")
_MANY_VALUES = re.compile(r"\\(?:pm|mp|dots|ldots|cdots|cup|cap|mid)(?![A-Za-z])|\.\.\.|:|\bor\b|\band\b|=|\\in(?![A-Za-z])|<|>|\\text|\\n?e?q?uad")


def depth(text: str) -> int:
    """The deepest nesting of brackets of any kind; one pass."""
    deepest = now = 0
    for token in _TOKEN.finditer(text):
        if token[0] in _OPENING:
            now += 1
            deepest = max(deepest, now)
        elif token[0] in _CLOSING:
            now -= 1
    return deepest


def contradiction(prediction: str, gold: str) -> bool:
    """True when two normalised answers cannot be equal, whatever the parser makes of them."""
    if units_conflict(prediction, gold) or negated(prediction) != negated(gold):
        return True
    if _base_differs(prediction, gold) or bool(_SPACED_NUMBERS.search(prediction)) != bool(_SPACED_NUMBERS.search(gold)):
        return True
    left, right = _listed(prediction), _listed(gold)
    if right is None and left is not None and number(gold) is not None and number(prediction) is None:
        return not _MANY_VALUES.search(prediction)  # two values where one is asked for
    if left is None or right is None:
        return False
    if left[0] and right[0] and left[0] != right[0]:
        return True
    if "{}" in (left[0], right[0]) or _MANY_VALUES.search(prediction) or _MANY_VALUES.search(gold):
        return False  # a set may repeat its elements, and one element may stand for several
    return left[1] != right[1]


def _listed(text: str) -> tuple[str, int] | None:
    """(brackets, number of elements) of a list: `("(]", 2)` of `(3, 4]`, `("", 3)` of `3, 5, 7`; None for anything else."""
    text = _PREFIX.sub("", text).strip()
    stack: list[tuple[str, int]] = []
    commas = {0: 0, 1: 0}
    outer: str | None = None
    for token in _TOKEN.finditer(text):
        if token[0] in _OPENING:
            stack.append((_OPENING[token[0]], token.start()))
        elif token[0] in _CLOSING:
            if not stack:
                return None
            opening, start = stack.pop()
            if not stack and start == 0 and token.end() == len(text):
                outer = opening + _CLOSING[token[0]]
        elif token[0] in ",;" and len(stack) < 2:
            commas[len(stack)] += 1
    if stack or (commas[0] == 0 and (not outer or commas[1] == 0)):
        return None
    return ("", commas[0] + 1) if commas[0] else (outer or "", commas[1] + 1)


def _base_differs(prediction: str, gold: str) -> bool:
    """A number in another base than ten keeps its base and its digits; without the base it is another number."""
    right = _BASED.fullmatch(gold.strip())
    left = _BASED.fullmatch(_PREFIX.sub("", prediction).strip())
    if right is None and left is None:
        return False
    if right is None or left is None:
        written = (right or left)
        other = prediction if left is None else gold
        base = written["base"] or written["short"]
        return base not in ("10", "ten") and re.fullmatch(r"[+-]?[\dA-F.,]+", other.strip()) is not None
    return _base_key(left) != _base_key(right)


def _base_key(match: re.Match[str]) -> tuple[str, str]:
    names = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
    base = match["base"] or match["short"]
    return match["digits"].replace(" ", "").lstrip("+0"), names.get(base, base)
