"""Verdicts that need no parser: numbers in exact rational arithmetic, words, letters of a multiple choice.

Each of these decides only where both answers are plainly of its kind, and then finally: the parser's numeric comparison
keeps 15 digits and rounds to 6 decimals, so it takes 1e-8 for 2e-8; this one does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_antisd.grading.units import strip_unit, units_conflict

MAX_EXPONENT = 1000
"""Powers of ten beyond this are left to the parser: exact arithmetic would build the number."""
ROUNDED_DECIMALS = 6
"""Decimals that a rounded number must at least have to stand for the number it was rounded from."""
RELATIVE_TOLERANCE = Fraction(1, 100_000)
"""Of a rounded number, beside the decimals: 0.000001 is not 1/1500000."""

_SIGN = r"(?P<sign>[+-]?)\s*"
_GROUPED = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?"
_PLAIN = r"\d+(?:\.\d*)?|\.\d+"
_TEN_TO = r"10\s*\^\s*(?:\{\s*(?P<power>[+-]?\s*\d+)\s*\}|(?P<short>\d))"
_NUMBER = re.compile(rf"{_SIGN}(?P<digits>{_GROUPED}|{_PLAIN})(?:\s*(?:\\times|\\cdot|\*)\s*{_TEN_TO})?", re.ASCII)
_POWER_OF_TEN = re.compile(_SIGN + _TEN_TO, re.ASCII)
_FRACTION = re.compile(
    rf"{_SIGN}(?:(?P<whole>\d+)\s*)?\\frac\s*(?:\{{\s*(?P<over_sign>[+-]?)\s*(?P<over>\d+)\s*\}}|(?P<over1>\d))"
    r"\s*(?:\{\s*(?P<under>\d+)\s*\}|(?P<under1>\d))", re.ASCII,
)  # fmt: skip
_SLASH = re.compile(rf"{_SIGN}(?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)", re.ASCII)
_REPEATING = re.compile(rf"{_SIGN}(?P<whole>\d*)\.(?P<fixed>\d*)\s*\\(?:overline|bar)\s*(?:\{{\s*(?P<period>\d+)\s*\}}|(?P<digit>\d))", re.ASCII)
_DECIMAL_COMMA = re.compile(rf"{_SIGN}(?P<digits>\d+,\d+)", re.ASCII)
_CURRENCY = re.compile(r"^([+-]?)\s*(?:\\\$|\$|€|£|¥|₹|\\text\s*\{\s*\\?\$\s*\}|\\(?:pounds|euro)(?![A-Za-z]))\s*")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*(?:percent|per cent)\s*\}?)$")
_CHOICE = re.compile(
    r"(?:\\text\s*\{\s*)?(?:(?i:option|choice|answer)\s*:?\s*)?(?:\\text\s*\{\s*)?(?:\*\*)?\(?\s*(?:\\(?:text|mathrm|mathbf)\s*\{\s*)?\(?\s*"
    r"(?P<letter>[A-J])\s*\)?\s*\}?\s*(?:\*\*)?\s*\)?[.:]?\s*\}?\s*\}?\s*(?:\*\*)?"
)
_CHOICE_WITH_CONTENT = re.compile(r"(?:\\text\s*\{\s*)?(?:\((?P<a>[A-J])\)|(?P<b>[A-J])[.):])\s*\}?[\s:]*(?P<content>\S.*)")
_SMALL_CHOICE = re.compile(r"(?:\\text\s*\{\s*)?\((?P<letter>[a-j])\)\s*\}?")
_OTHER_CHOICE = re.compile(r"\([A-J]\)|(?<![A-Za-z])[A-J][.):]")
_TEXT = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{([^{}\\$]*)\}")
_DIFFERENCE = re.compile(r"(?<![^\W\d_])[^\W\d_]\s*-|-\s*[^\W\d_](?![^\W\d_])")
_WORDS = re.compile(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+)*")


@dataclass(frozen=True, kw_only=True)
class Number:
    """A rational number as it was written."""

    value: Fraction
    decimals: int | None
    """Digits after the point where it was written as a decimal with a point; None: an exact integer or fraction."""
    percent: bool = False


def exact_verdict(prediction: str, gold: str) -> bool | None:
    """True or False where the two normalised answers are numbers, words or choices; None: the parser must decide."""
    choice = _choice_verdict(prediction, gold)
    if choice is not None:
        return choice
    right = number(gold)
    if right is not None:
        left = number(prediction) or _decimal_comma(prediction, right)
        return None if left is None else _same_number(left, right) and not units_conflict(prediction, gold)
    return _word_verdict(prediction, gold)


def number(text: str) -> Number | None:
    """The number that a normalised answer is, with or without currency, percent sign, degrees and unit; else None.

    Integers, decimals (thousands grouped by commas or not), scientific notation, fractions and mixed numbers.
    """
    text = _CURRENCY.sub(r"\1", text)
    shorter = _PERCENT.sub("", text)
    percent = shorter != text
    text = strip_unit(shorter) if not percent else shorter
    for read in (_decimal, _power_of_ten, _fraction, _repeating):
        found = read(text.strip())
        if found is not None:
            return Number(value=found.value, decimals=found.decimals, percent=percent)
    return None


def _decimal(text: str) -> Number | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    power = int((match["power"] or match["short"] or "0").replace(" ", ""))
    whole, point, rest = match["digits"].replace(",", "").partition(".")
    if abs(power) > MAX_EXPONENT or len(whole) + len(rest) > 4000:
        return None
    value = Fraction(int((whole + rest) or "0")) * Fraction(10) ** (power - len(rest))
    return Number(value=-value if match["sign"] == "-" else value, decimals=len(rest) - power if point and rest else None)


def _power_of_ten(text: str) -> Number | None:
    match = _POWER_OF_TEN.fullmatch(text)
    power = int((match["power"] or match["short"]).replace(" ", "")) if match else MAX_EXPONENT + 1
    if match is None or abs(power) > MAX_EXPONENT:
        return None
    return Number(value=Fraction(10) ** power * (-1 if match["sign"] == "-" else 1), decimals=None)


def _fraction(text: str) -> Number | None:
    match = _FRACTION.fullmatch(text) or _SLASH.fullmatch(text)
    if match is None:
        return None
    groups = match.groupdict()
    over, under = groups["over"] or groups.get("over1"), groups["under"] or groups.get("under1")
    if int(under) == 0 or max(len(over), len(under), len(groups["whole"] or "")) > 1000 or (groups["whole"] and groups.get("over_sign")):
        return None
    value = Fraction(int(groups["whole"] or 0)) + Fraction(int(over), int(under))
    negative = (groups["sign"] == "-") != (groups.get("over_sign") == "-")
    return Number(value=-value if negative else value, decimals=None)


def _repeating(text: str) -> Number | None:
    r"""`0.1\overline{6}`."""
    match = _REPEATING.fullmatch(text)
    if match is None or len(text) > MAX_EXPONENT:
        return None
    period = match["period"] or match["digit"]
    value = Fraction(int((match["whole"] + match["fixed"]) or "0")) + Fraction(int(period), 10 ** len(period) - 1)
    value /= 10 ** len(match["fixed"])
    return Number(value=-value if match["sign"] == "-" else value, decimals=None)


def _decimal_comma(text: str, gold: Number) -> Number | None:
    """`2,74` where the gold is a decimal; beside anything else it is a list of two."""
    match = _DECIMAL_COMMA.fullmatch(strip_unit(_CURRENCY.sub(r"\1", text)).strip())
    return _decimal(match[0].replace(",", ".")) if match and gold.decimals else None


def _same_number(prediction: Number, gold: Number) -> bool:
    if _same_value(prediction, gold):
        return True
    if prediction.percent == gold.percent:
        return False
    # A percent sign may be missing where the gold has one, and is taken for a unit after an integer. Else 50% is 0.5.
    if gold.percent or gold.value.denominator == 1:
        return _same_value(prediction, gold, as_written=True) or _same_value(prediction, gold, as_written=False)
    return _same_value(prediction, gold, as_written=False)


def _same_value(prediction: Number, gold: Number, *, as_written: bool | None = None) -> bool:
    """`as_written`: the digits alone; False: percent as hundredths; None: only where both or neither have the sign."""
    if as_written is None and prediction.percent != gold.percent:
        return False
    values = [one.value / 100 if one.percent and as_written is False else one.value for one in (prediction, gold)]
    if values[0] == values[1]:
        return True
    decimals = [one.decimals for one in (prediction, gold) if one.decimals is not None]
    if not decimals or min(decimals) < ROUNDED_DECIMALS or prediction.percent or gold.percent:
        return False
    scale = 10 ** min(min(decimals), 4000)
    if abs(values[0] - values[1]) > RELATIVE_TOLERANCE * max(map(abs, values)):
        return False
    return round(values[0] * scale) == round(values[1] * scale)


def choice(text: str) -> str | None:
    """The letter of a multiple-choice answer: `A`, `(A)`, `A.`, `\\text{(A)}`, `option A`; else None."""
    match = _CHOICE.fullmatch(text)
    return match["letter"] if match else None


def _choice_verdict(prediction: str, gold: str) -> bool | None:
    right = choice(gold)
    if right is None:
        return None
    left = choice(prediction)
    if left is not None:
        return left == right
    small = _SMALL_CHOICE.fullmatch(prediction)
    if small and "(" in gold:
        return small["letter"].upper() == right
    match = _CHOICE_WITH_CONTENT.fullmatch(prediction)  # `(A) 5`, the letter with what it stands for
    if match is None or _OTHER_CHOICE.search(match["content"]):
        return None
    return (match["a"] or match["b"]) == right


def _word_verdict(prediction: str, gold: str) -> bool | None:
    left, right = _words(prediction), _words(gold)
    if left is None or right is None:
        return None
    if not any(_TEXT.search(text) for text in (prediction, gold)) and min(len(" ".join(left)), len(" ".join(right))) < 3:
        return None  # `pq` and `qp` are products, not words
    if len(left) == len(right) == 1 and max(len(left[0]), len(right[0])) == 1:
        return left == right
    # A letter is a variable or a label, and its case counts.
    lowered = tuple(sorted(word.lower() if len(word) > 1 else word for word in words) for words in (left, right))
    if lowered[0] == lowered[1]:
        return True
    # Without \text, letters may be a product or a function: only the parser knows.
    return False if all(_TEXT.search(text) or " " in text for text in (prediction, gold)) or _one_is_text(prediction, gold) else None


def _one_is_text(prediction: str, gold: str) -> bool:
    return bool(_TEXT.fullmatch(prediction.strip()) or _TEXT.fullmatch(gold.strip()))


def _words(text: str) -> list[str] | None:
    """The comma-separated words of an answer that holds nothing else; None otherwise."""
    plain = _TEXT.sub(lambda found: f" {found[1]} ", text)
    if re.search(r"[(\[][^()]*,", plain) or _DIFFERENCE.search(text):
        return None  # a tuple has an order, and p - q is no word
    parts = [" ".join(part.split()) for part in re.split(r",|;|\band\b", plain)]
    parts = [part.strip("()") for part in parts if part]
    return parts if parts and all(_WORDS.fullmatch(part) for part in parts) else None
