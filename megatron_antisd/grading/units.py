"""Units and other words behind an answer: a unit may be missing, but what both answers name must be the same.

Nothing is converted: 5 cm is not 50 mm here, and $5 is not 500 cents.
"""

from __future__ import annotations

import re

_NAMES: dict[str, str] = {
    "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard yards", "mi": "mi mile miles", "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces", "s": "sec secs", "min": "min mins minute minutes", "h": "h hr hrs hour hours", "day": "day days",
    "week": "week weeks", "month": "month months", "year": "year years yr yrs", "cent": "cent cents",
    "dollar": "dollar dollars usd USD", "euro": "euro euros eur EUR", "yuan": "yuan", "yen": "yen", "gal": "gal gallon gallons",
    "deg": "degree degrees deg", "rad": "radian radians rad rads", "mi/h": "mph", "km/h": "kph kmh", "km": "Km", "kg": "Kg kgs",
    "unit": "unit units", "point": "point points", "percent": "percent", "atm": "atm atmosphere atmospheres", "cal": "cal calorie calories",
    "rpm": "rpm", "acre": "acre acres", "au": "AU", "erg": "erg ergs",
}  # fmt: skip
_METRIC = {"m": "meter metre", "g": "gram", "s": "second", "l": "liter litre", "Hz": "hertz", "eV": "electronvolt", "J": "joule", "W": "watt",
           "V": "volt", "N": "newton", "Pa": "pascal", "A": "ampere amp", "K": "kelvin", "mol": "mole",
           "C": "coulomb", "T": "tesla", "F": "farad"}  # fmt: skip
_PREFIXES = {"": "", "p": "pico", "n": "nano", "m": "milli", "c": "centi", "k": "kilo", "M": "mega", "G": "giga"}


def _table() -> dict[str, str]:
    table: dict[str, str] = {}
    for symbol, names in _METRIC.items():
        for short, long in _PREFIXES.items():
            table[short + symbol] = short + symbol
            table |= {long + name + plural: short + symbol for name in names.split() for plural in ("", "s")}
    table |= {"L": "l", "mL": "ml"}
    return table | {name: unit for unit, names in _NAMES.items() for name in names.split()}


UNITS = _table()
"""Spelling -> one name per unit. Case counts: mW is not MW."""
# Bare behind a number, only words that cannot be a product of variables.
_BARE = "|".join(sorted((name for name in UNITS if len(name) > 2 or name in ("cm", "km", "kg", "mm", "ft", "mi")), key=len, reverse=True))
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
_PIECE = r"\\(?:text|mathrm)\s*\{[^{}]*\}" + _POWER
_CIRCLE = r"\^\s*\\circ(?![A-Za-z])\s*"
_TRAILING = re.compile(
    rf"(?:\\?\s)*(?P<circle>{_CIRCLE})?(?:(?P<pieces>{_PIECE}(?:\s*(?:\\cdot\s*|/\s*)?{_PIECE}){{0,5}})"
    rf"|(?<=[\d}}\s)])(?P<bare>(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:{_BARE})\b\.?{_POWER})|(?<=circ)|(?<=circ\s))$"
)  # fmt: skip
# What words cannot stand behind: an operator, a subscript, a comma.
_NO_HEAD = re.compile(r"(?:[-+*/=<>_^,;:|&(\[]|\\(?:cdot|times|div|le|ge|ne|in|cup|cap|pm|mp|to|approx|sim|equiv|quad|qquad|text|mathrm))$")
_CURRENCY = re.compile(r"^[+-]?\s*(\\\$|\$(?![^$]*\$)|€|£|¥|₹|\\text\s*\{\s*\\?\$\s*\}|\\(?:pounds|euro)(?![A-Za-z]))")
_SIGNS = {"€": "euro", r"\euro": "euro", "£": "sterling", r"\pounds": "sterling", "¥": "yen", "₹": "rupee"}
_AREA = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_TOKEN = re.compile(r"/|[A-Za-z]+(?:\s*\^\s*\{?\s*-?\d\s*\}?)?|[^\sA-Za-z]+")
# Words that change what stands before them: no unit, and never left out.
_MEANING = frozenset(
    "or and not is are was were be base mod modulo remainder at most least plus minus more less fewer than per over under about approximately approx "
    "hundred thousand million billion trillion dozen gross score pair pairs half halves third thirds quarter quarters fourth fourths fifth fifths "
    "sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths squared cubed "
    "factorial choose one two three four five six seven eight nine ten eleven twelve twenty if when where unless to of from only wrong incorrect "
    "false am pm north south east west minimum maximum min max imaginary negative double twice percent".split()
)
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|cannot|except|undefined|impossible)\b", re.IGNORECASE)
_QUALIFIER = re.compile(r"\b(?:least|most|more|less|fewer|than)\b", re.IGNORECASE)


def split_words(text: str) -> tuple[str, str]:
    """(what stands before, the unit or words at the end) of a normalised answer; the second is empty without any."""
    match = _TRAILING.search(text)
    head = text[: match.start()].rstrip() if match else ""
    if match is None or not head or _NO_HEAD.search(head):
        return text, ""
    return head, match[0].strip()


def strip_unit(text: str) -> str:
    """A normalised answer without the unit at its end; words are a unit only behind something that can carry one."""
    head, words = split_words(text)
    return head if words and re.search(r"[\d})]$", head) and _may_be_missing(_form(words)) else text


def meaning(text: str) -> tuple[str, ...]:
    r"""What a normalised answer says beside its value, in one spelling: `("cm^2",)` of `5\text{ square cm}`, () of `5`."""
    found = ("percent",) if text.endswith("%") else _form(split_words(text)[1])
    sign = _CURRENCY.match(text)
    if sign is None:
        return found
    currency = _SIGNS.get(sign[1], "dollar")
    return found if currency in found else (currency, *found)


def units_conflict(prediction: str, gold: str) -> bool:
    """Both answers say something beside their value, and not the same; or one does, and it is more than a unit."""
    left, right = meaning(prediction), meaning(gold)
    if left == right:
        return False
    if left and right:
        # A degree sign alone may be one of temperature.
        return not (left[:1] == right[:1] == ("deg",) and min(left, right) == ("deg",) and max(left, right) in (("deg", "C"), ("deg", "F")))
    return not _may_be_missing(left or right)


def _form(words: str) -> tuple[str, ...]:
    r"""Units in the spelling of the table with their power, other words in lower case and singular; "/" and "per" before a divisor."""
    if not words:
        return ()
    circle = re.match(_CIRCLE, words)
    rest = words[circle.end() :] if circle else words
    plain = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}", r" \1", rest).replace(r"\cdot", " ")
    found: list[str] = ["deg"] if circle else []
    below, power = False, ""
    for token in _TOKEN.findall(re.sub(r"(?<=[A-Za-z])\.(?=\s|$)", "", plain)):
        word, _, written = token.partition("^")
        word = word.strip()
        if word in ("/", "per"):
            below = True
        elif word.lower() in _AREA:
            power = _AREA[word.lower()]
        else:
            name = _name(word) if not circle else word
            exponent = written.strip(" {}") or power
            if exponent.startswith("-"):
                below, exponent = True, exponent[1:]
            name += f"^{exponent}" if exponent not in ("", "1") else ""
            found += [f"/{part}" if below or place else part for place, part in enumerate(name.split("/"))]
            power = ""
            below = False
    return tuple(found)


def _name(word: str) -> str:
    lowered = word.lower()
    if word in UNITS:
        return UNITS[word]
    if len(word) > 3 and lowered in UNITS:
        return UNITS[lowered]
    return lowered[:-1] if len(word) > 3 and lowered.endswith("s") and not lowered.endswith("ss") and lowered not in _MEANING else lowered


def _may_be_missing(form: tuple[str, ...]) -> bool:
    """Known units, or at most two plain words."""
    if form[:1] == ("deg",):
        return form in (("deg",), ("deg", "C"), ("deg", "F"))
    names = [part.lstrip("/").partition("^")[0] for part in form]
    known = frozenset(UNITS.values()) | {"sterling", "rupee"}
    if all(name in known for name in names):
        return True
    plain = all(name.isalpha() and len(name) > 1 and name not in _MEANING and not _NEGATION.fullmatch(name) for name in names)
    return plain and len(names) <= 2 and not any(part.startswith("/") and part[1:] not in known for part in form)


def negated(text: str) -> tuple[str, ...]:
    r"""The words of an answer that deny or bound something: `("not",)` of `\text{not } 5`."""
    return tuple(sorted({found.lower() for pattern in (_NEGATION, _QUALIFIER) for found in pattern.findall(text)}))
