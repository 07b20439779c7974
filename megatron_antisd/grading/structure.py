"""What must agree between two answers before the parser's word is taken: brackets, number of elements, base, units, denial.

Math-Verify reads `[6, 31, -1]` and `(6, 31, -1)` as one tuple, `52_8` as 52 and `5 km` as 5. These rules only ever refuse.
"""

from __future__ import annotations

import re

from megatron_antisd.grading.exact import number
from megatron_antisd.grading.notation import key
from megatron_antisd.grading.units import negated, strip_unit, units_conflict

MAX_DEPTH = 12
"""Brackets within brackets that are handed to the parser; its time grows exponentially with braces."""

_TOKEN = re.compile(r"\\[{}|]|\\(?:langle|rangle|begin|end)(?![A-Za-z])|\\[A-Za-z]+|\\.|[()\[\]{},;]")
_OPENING = {"(": "(", "[": "[", "{": "", r"\{": "{", r"\langle": "(", r"\begin": ""}
_CLOSING = {")": ")", "]": "]", "}": "", r"\}": "}", r"\rangle": ")", r"\end": ""}
_PREFIX = re.compile(r"^(?:\(?[A-Za-z_0-9{}, ]{1,20}\)?\s*(?:=|\\in(?![A-Za-z]))\s*)")
_BASED = re.compile(r"(?P<digits>[+-]?\s*[0-9A-F]+(?:\.[0-9A-F]+)?)\s*_\s*(?:\{\s*(?:\\text\s*\{)?\s*(?P<base>[a-z0-9]+)\s*\}?\s*\}|(?P<short>\d))")
_SPACED_NUMBERS = re.compile(r"(?<![\d._^])\d+\s+\d+(?!\s*[/\d.]*/)(?![\d.]*\s*[/}])")
_MANY_VALUES = re.compile(r"\\(?:pm|mp|dots|ldots|cdots|cup|cap|mid)(?![A-Za-z])|\.\.\.|:|\bor\b|\band\b|=|\\in(?![A-Za-z])|<|>|\\text|\\n?e?q?uad")
_PRIMED = re.compile(r"[\w)}]?\s*'+")
_WORDS = re.compile(r"\\text\s*\{[^{}]*\}")
_NAMED = re.compile(r"^\s*[A-Za-z]'*\s*(?:\([^()]*\))?\s*=")
_CAPITALS = re.compile(r"[A-Z]{2,}")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}")
_ELLIPSIS = re.compile(r"\\dots(?![A-Za-z])|\.\.\.")
# `1/2x` is half of x to some and one over 2x to others.
_AMBIGUOUS_SLASH = re.compile(r"/\s*\d+\s*(?:[A-Za-z]|\\(?:pi|sqrt|alpha|beta|theta|lambda|omega)(?![A-Za-z]))")
_BOUND = r"\s*(?P<{0}>[^<>=,;:]*?[^<>=,;:\s\\])\s*"
_RELATION = r"(?P<{0}><|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\lt(?![A-Za-z])|\\gt(?![A-Za-z]))"
_BETWEEN = re.compile(_BOUND.format("low") + _RELATION.format("first") + r"\s*[A-Za-z]\s*" + _RELATION.format("second") + _BOUND.format("high"))
_ONE_SIDED = re.compile(r"[A-Za-z]\s*" + _RELATION.format("first") + _BOUND.format("end"))


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
    if _reads_otherwise(prediction, gold):
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


def _reads_otherwise(prediction: str, gold: str) -> bool:
    """Primes, words of capitals, dates, ellipses and slashes, which the parser drops or reads its own way."""
    both_equations = "=" in prediction and "=" in gold
    if _primes(prediction, both_equations) != _primes(gold, both_equations) or bool(_ELLIPSIS.search(prediction)) != bool(_ELLIPSIS.search(gold)):
        return True
    slashes = [bool(_AMBIGUOUS_SLASH.search(strip_unit(text))) for text in (prediction, gold)]
    if slashes[0] != slashes[1]:
        return True
    values = [key(text if both_equations else _PREFIX.sub("", text)) for text in (prediction, gold)]
    for pattern in (_CAPITALS, _DATE):
        if any(pattern.fullmatch(value) for value in values):
            return values[0] != values[1]
    return False


def _primes(text: str, whole: bool) -> set[str]:
    """What carries primes; without `whole` the name that the value is given to, `y' = `, is left out."""
    text = _WORDS.sub("", text)
    return {found.replace(" ", "") for found in _PRIMED.findall(text if whole else _NAMED.sub("", text))}


def repeated(text: str) -> list[str] | None:
    """The elements that a bare list holds more than once, one entry for each time too many; None for anything but a bare list of values."""
    found = _listed(text)
    if found is None or found[0] or len(sides(_PREFIX.sub("", text))) > 1:
        return None
    seen: set[str] = set()
    again: list[str] = []
    for part in _elements(_PREFIX.sub("", text)):
        if part in seen:
            again.append(part)
        seen.add(part)
    return again


def _elements(text: str) -> list[str]:
    """What commas and semicolons outside of brackets separate, without spaces."""
    parts, nested, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        nested += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if token[0] in ",;" and nested == 0:
            parts.append(key(text[start : token.start()].strip()))
            start = token.end()
    return [*parts, key(text[start:].strip())]


def sides(text: str) -> list[str]:
    """What equality signs outside of brackets separate; a single entry without any."""
    parts, nested, start = [], 0, 0
    for token in re.finditer(rf"{_TOKEN.pattern}|(?<![<>!:])=(?!=)", text):
        nested += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if token[0] == "=" and nested == 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]


def as_interval(text: str) -> str | None:
    r"""`(0, 1]` of `0<x\le 1`, `[3, \infty)` of `x\ge 3`; None for anything but one letter between or beside bounds."""
    between, beside = _BETWEEN.fullmatch(text.strip()), _ONE_SIDED.fullmatch(text.strip())
    if between:
        kinds = [_kind(between[name]) for name in ("first", "second")]
        if kinds[0][0] != kinds[1][0]:
            return None
        ends = [(between["low"], kinds[0][1]), (between["high"], kinds[1][1])]
        (low, closed_low), (high, closed_high) = ends if kinds[0][0] == "<" else ends[::-1]
        return f"{'[' if closed_low else '('}{low}, {high}{']' if closed_high else ')'}"
    if beside:
        sign, closed = _kind(beside["first"])
        return rf"(-\infty, {beside['end']}{']' if closed else ')'}" if sign == "<" else rf"{'[' if closed else '('}{beside['end']}, \infty)"
    return None


def is_interval(text: str) -> bool:
    """A pair in round or square brackets."""
    found = _listed(text)
    return found is not None and found[1] == 2 and found[0] in ("()", "[]", "(]", "[)")


def _kind(relation: str) -> tuple[str, bool]:
    """(direction, whether the bound belongs to it)."""
    return "<" if relation in ("<", r"\le", r"\lt") else ">", relation in (r"\le", r"\ge")


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
