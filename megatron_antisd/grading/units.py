"""Units behind an answer: they may be missing, but where both answers name one, it must be the same."""

from __future__ import annotations

import re

_NAMES: dict[str, str] = {
    "mm": "mm millimeter millimeters millimetre millimetres", "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres", "km": "km kilometer kilometers kilometre kilometres", "in": "in inch inches",
    "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles", "g": "g gram grams", "kg": "kg kilogram kilograms kgs",
    "mg": "mg milligram milligrams", "lb": "lb lbs pound pounds", "oz": "oz ounce ounces", "s": "s sec secs second seconds",
    "ms": "ms millisecond milliseconds", "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years yr yrs", "cent": "cent cents",
    "dollar": "dollar dollars usd", "euro": "euro euros eur", "yuan": "yuan", "yen": "yen", "l": "l liter liters litre litres",
    "ml": "ml milliliter milliliters", "gal": "gal gallon gallons", "deg": "degree degrees deg", "rad": "radian radians rad",
    "mph": "mph", "k": "kelvin", "j": "joule joules", "kj": "kj kilojoule kilojoules", "ev": "ev", "n": "newton newtons",
    "w": "watt watts", "v": "volt volts", "hz": "hz hertz", "pa": "pa pascal pascals", "mol": "mol mole moles",
    "unit": "unit units", "point": "point points", "percent": "percent",
}  # fmt: skip
UNITS = {name: unit for unit, names in _NAMES.items() for name in names.split()}
"""Spelling, in lower case -> one name per unit."""
# Bare behind a number, only words that cannot be a product of variables.
_BARE = "|".join(sorted((name for name in UNITS if len(name) > 2 or name in ("cm", "km", "kg", "mm", "ft", "mi")), key=len, reverse=True))
_POWER = r"(?:\s*\^\s*\{?\s*(?P<power>\d)\s*\}?)"
_TRAILING = re.compile(
    r"(?:\\?\s)*(?:\\(?:text|mathrm)\s*\{(?P<text>[^{}]*)\}" + _POWER + r"?|(?<=[\d}\s)])(?P<bare>(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:"
    + _BARE + r"))\b\.?" + _POWER.replace("power", "bare_power") + r"?|\^\s*\\circ\s*(?P<degrees>))$"
)  # fmt: skip
_AREA = {"square": "2", "sq": "2", "sq.": "2", "cubic": "3", "cu": "3", "cu.": "3"}
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|cannot|except|undefined|impossible)\b", re.IGNORECASE)


def strip_unit(text: str) -> str:
    """A normalised answer without the unit at its end; words are a unit only behind something that can carry one."""
    match = _TRAILING.search(text)
    if match is None or not re.search(r"[\d})]\s*$", text[: match.start()]) or _NEGATION.search(match[0]):
        return text
    return text[: match.start()].rstrip()


def unit(text: str) -> tuple[str, str] | None:
    """(unit, power) at the end of a normalised answer, `("cm", "2")`; None without a known one."""
    match = _TRAILING.search(text)
    if match is None or not text[: match.start()].strip():
        return None
    if match["degrees"] is not None:
        return "deg", "1"
    words = (match["text"] or match["bare"] or "").lower().split()
    power = match["power"] or match["bare_power"] or "1"
    if words and words[0] in _AREA:
        power, words = _AREA[words[0]], words[1:]
    known = UNITS.get(words[0].strip(".")) if len(words) == 1 else None
    return (known, power) if known else None


def units_conflict(prediction: str, gold: str) -> bool:
    """Both answers name a known unit, and not the same. Nothing is converted: 5 cm is not 50 mm here."""
    left, right = unit(prediction), unit(gold)
    return left is not None and right is not None and left != right


def negated(text: str) -> bool:
    """The words of an answer deny something: `\\text{not } 5`."""
    return bool(_NEGATION.search(text))
