"""Answers made from a right one: NEGATIVES are no longer equal to it, POSITIVES are the same answer written another way.

Each kind is a pure function of the gold, so the rates measured from them are the same on every machine. A kind returns
nothing for a gold to which it does not apply, or for which the result could still be right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Kind = Callable[[str], str | None]

GOLDS = (
    "5", "-17", "204", "2016532", "0.25", "3.1415", "1.6e-19", "6.02e23", r"\frac{3}{4}", r"-\frac{7}{12}", r"\dfrac{17}{50}", 
    r"\frac{9 \sqrt{23}}{23}",
    r"2\sqrt{3}", r"14+4\sqrt{37}", "6 - 5i", r"12\pi", r"3 \pm 2 \sqrt{2}", "x^2+3x-6", "x^5 - x^4 + x - 1", "6r^2-4r-24", "y = 2x + 3",
    "x=5", "(3, 4)", "(6,31,-1)", r"\left( 3, \frac{\pi}{2} \right)", "(3,4]", "[0,3)", "[-2,7]", r"(-\infty, 0]", r"(0,9) \cup (9,36)",
    r"\{4,5,7\}", "3, 5, 7", "1,-2", r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
    r"90^\circ", r"10\%", r"\$18.90", r"5.4 \text{ cents}", r"15\mbox{ cm}^2", r"20\text{ days}", "58,500", r"10,\!080", r"1\frac{4}{5}",
    "52_8", "7:32", r"\text{Evelyn}", r"\text{east}", r"\text{(C)}", "B", "p - q", r"\cot x", r"e^{t} / 3", "x \\le 3", r"2^{25} \cdot 26!",
)  # fmt: skip
"""A self-written set with every shape of answer, for where no data is at hand."""

_TEXT = r"\\(?:text\w*|mbox|mathrm|textnormal)\s*\{[^{}]*\}(?:\^\{?\d\}?)?"
_OPAQUE = re.compile(rf"{_TEXT}|\\(?:begin|end)\{{\w+\}}|\\[A-Za-z]+|\d*\.?\d+e[+-]?\d+")
_LETTER = re.compile(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")
_BRACKETED = re.compile(r"(?:\\left\s*)?([(\[]|\\\{)([^()\[\]{}]*?(?:\{[^{}]*\}[^()\[\]{}]*?)*?)(?:\\right\s*)?([)\]]|\\\})")
_WORDS = re.compile(r"\\text\{\s*([A-Za-z]{2,})\s*\}")


def _plain_spans(gold: str) -> Iterable[tuple[int, int]]:
    """Stretches of the gold outside of commands, words and units."""
    start = 0
    for found in _OPAQUE.finditer(gold):
        yield start, found.start()
        start = found.end()
    yield start, len(gold)


def _replace_last(gold: str, pattern: str, new: Callable[[re.Match[str]], str]) -> str | None:
    """The last match of `pattern` outside of commands and words replaced."""
    for start, end in reversed(list(_plain_spans(gold))):
        found = list(re.finditer(pattern, gold[start:end]))
        if found:
            last = found[-1]
            return gold[: start + last.start()] + new(last) + gold[start + last.end() :]
    return None


def _digit(gold: str) -> str | None:
    return _replace_last(gold, r"\d", lambda m: str((int(m[0]) + 1) % 10))


def _leading_digit(gold: str) -> str | None:
    found = re.search(r"(?<![\d.\\A-Za-z{_])[1-9]", gold)
    if not found or gold[: found.start()].strip("-+ $\\([{"):
        return None
    return gold[: found.start()] + str(int(found[0]) % 9 + 1) + gold[found.end() :]


def _is_zero(gold: str) -> bool:
    return not re.search(r"[1-9A-Za-z]", gold)


def _sign(gold: str) -> str | None:
    """The sign of the whole; not where the negative is the same (zero, a plus-minus) or means nothing (words, lists, relations)."""
    if _is_zero(gold) or re.search(r"\\(?:text|mbox|pm|infty|cup|begin)|[,=<>:;\[\]_]|\\(?:le|ge|in|ne)|^[A-Z]$", gold):
        return None
    if re.search(r"(?<!^)[+-]", gold) and not re.search(r"e[+-]\d", gold):
        return f"-({gold})"
    return gold[1:].lstrip() if gold.startswith("-") else f"-{gold}"


def _inner_sign(gold: str) -> str | None:
    return _replace_last(gold, r"(?<=[\w})] )[+-](?= ?[\w\\(])|(?<=[\w})])[+-](?=[\w\\(])", lambda m: "-" if m[0] == "+" else "+")


def _variable(gold: str) -> str | None:
    if re.search(r"\\(?:text|mbox)", gold):
        return None
    return _replace_last(gold, _LETTER.pattern, lambda m: {"x": "z", "w": "v"}.get(m[0], "w"))


def _elements(gold: str) -> tuple[str, list[str], str] | None:
    """(opening, elements, closing) of a gold that is one bracketed or bare list."""
    gold = gold.strip()
    found = _BRACKETED.fullmatch(gold)
    opening, inner, closing = (gold[: found.start(2)], found[2], gold[found.end(2) :]) if found else ("", gold, "")
    # Without brackets a comma between digits groups thousands, and inside braces it belongs to something else.
    if "," not in inner or re.search(r"\\text|[({\[]", re.sub(r"\{[^{},]*\}", "", inner)) or re.search(r"\d,(\\!)?\s*\d{3}(?!\d)", inner):
        return None
    return opening, [part.strip() for part in inner.split(",")], closing


def _order(gold: str) -> str | None:
    parts = _elements(gold)
    if parts is None or not parts[0].strip().endswith(("(", "[")) or parts[1][0] == parts[1][1]:
        return None
    opening, elements, closing = parts
    return opening + ", ".join([elements[1], elements[0], *elements[2:]]) + closing


def _bracket(gold: str) -> str | None:
    found = _BRACKETED.fullmatch(gold.strip())
    if not found or "," not in found[2]:
        return None
    other = {"(": ("[", "]"), "[": ("(", ")"), r"\{": ("(", ")")}[found[1]]
    return other[0] + found[2].removesuffix(r"\right").strip() + other[1]


def _half_open(gold: str) -> str | None:
    """One end of an interval, open for closed."""
    at = max(gold.rfind(")"), gold.rfind("]"))
    if at < 0 or not re.search(r"\\infty|\\cup|\\in\b|\[", gold) or "infty" in gold[:at].rpartition(",")[2] or gold[at - 1 : at] == "\\":
        return None
    return gold[:at] + {")": "]", "]": ")"}[gold[at]] + gold[at + 1 :]


def _set_for_tuple(gold: str) -> str | None:
    parts = _elements(gold)
    if parts is None or parts[0].strip() not in ("(", r"\left("):
        return None
    return r"\{" + ", ".join(parts[1]) + r"\}"


def _dropped(gold: str) -> str | None:
    parts = _elements(gold)
    if parts is None or parts[1][-1] in parts[1][:-1]:
        return None
    return parts[0] + ", ".join(parts[1][:-1]) + parts[2]


def _added(gold: str) -> str | None:
    parts = _elements(gold)
    if parts is None:
        return None
    return parts[0] + ", ".join([*parts[1], "977"]) + parts[2]


def _one_of(gold: str) -> str | None:
    """Two answers where one is asked for."""
    return None if _elements(gold) or re.search(r"\\text|[,=<>]", gold) else f"{gold}, 977"


def _inverted(gold: str) -> str | None:
    found = _FRACTION.search(gold)
    if found is None or found[1].strip() == found[2].strip():
        return None
    return gold[: found.start()] + rf"\frac{{{found[2]}}}{{{found[1]}}}" + gold[found.end() :]


def _exponent(gold: str) -> str | None:
    found = re.search(r"(?<=[A-Za-z2-9)}])\^(?:\{(\d+)\}|(\d))", gold)
    if found is None or re.search(r"\\(?:text|mbox)", gold):
        return None
    return gold[: found.start()] + f"^{{{int(found[1] or found[2]) + 1}}}" + gold[found.end() :]


def _factor(gold: str) -> str | None:
    if _is_zero(gold) or re.search(r"\\(?:text|mbox|infty|cup|begin|pm)|[,=<>:;\[\]_]|\\(?:le|ge|in|ne)|^[A-Z]$|%", gold):
        return None
    return rf"2 \cdot ({gold})"


def _magnitude(gold: str) -> str | None:
    """Ten times as large, or a thousandth: where a tolerance is absolute, small numbers are all equal."""
    found = re.fullmatch(r"([+-]?)(\d*\.?\d+)(?:e([+-]?\d+))?", gold)
    if found is None or _is_zero(found[2]):
        return None
    power = int(found[3] or 0)
    return f"{found[1]}{found[2]}e{power - 3 if power < 0 else power + 1}"


def _unit(gold: str) -> str | None:
    names = "cm|m|km|inches|feet|cents|dollars|days|hours|miles|minutes|seconds|degrees"
    found = re.search(rf"\\(?:text|mbox|mathrm|textnormal)\{{\s*({names})\s*\}}", gold)
    if found is None:
        return None
    other = {"cm": "km", "inches": "miles", "feet": "inches", "cents": "dollars", "dollars": "cents", "days": "weeks", "degrees": "radians"}
    return gold[: found.start(1)] + other.get(found[1], "days" if found[1] in ("hours", "minutes", "seconds") else "cm") + gold[found.end(1) :]


def _unit_power(gold: str) -> str | None:
    found = re.search(r"\\(?:text|mbox|mathrm)\{[^{}]*\}\^\{?([23])\}?", gold)
    if found is None:
        return None
    return gold[: found.start(1)] + {"2": "3", "3": "2"}[found[1]] + gold[found.end(1) :]


def _word(gold: str) -> str | None:
    found = _WORDS.fullmatch(gold.strip())
    return None if found is None else rf"\text{{{'west' if found[1].lower() != 'west' else 'east'}}}"


def _choice(gold: str) -> str | None:
    found = re.fullmatch(r"(?:\\text\w*\{)?\(?([A-E])\)?\}?", gold.strip())
    return None if found is None else rf"\text{{({'ABCDE'[('ABCDE'.index(found[1]) + 1) % 5]})}}"


def _root(gold: str) -> str | None:
    """A root whose sign was forgotten."""
    found = re.search(r"\\sqrt\s*\{(\d+)\}", gold)
    if found is None or found[1] in ("0", "1"):
        return None
    return gold[: found.start()] + rf"\cdot {found[1]}" + gold[found.end() :] if found.start() else found[1] + gold[found.end() :]


def _constant(gold: str) -> str | None:
    """pi replaced by its usual approximation, which is another number."""
    return gold.replace(r"\pi", r"\cdot 3.14") if re.search(r"\d\s*\\pi", gold) else None


def _base(gold: str) -> str | None:
    found = re.fullmatch(r"(\d+)_\{?(\d+)\}?", gold)
    return None if found is None else f"{found[1]}_{{{int(found[2]) + 1}}}"


def _base_dropped(gold: str) -> str | None:
    found = re.fullmatch(r"(\d{2,})_\{?(\d+)\}?", gold)
    return None if found is None or found[2] == "10" else found[1]


def _relation(gold: str) -> str | None:
    for old, new in ((r"\le ", r"\ge "), (r"\leq ", r"\geq "), (r"\ge ", r"\le "), (r"\geq ", r"\leq "), ("<", ">"), (">", "<")):
        if old in gold:
            return gold.replace(old, new)
    return None


def _union(gold: str) -> str | None:
    return gold.replace(r"\cup", r"\cap") if r"\cup" in gold else None


def _union_part(gold: str) -> str | None:
    return gold.rpartition(r"\cup")[0].strip() if r"\cup" in gold else None


def _transposed(gold: str) -> str | None:
    found = re.fullmatch(r"\\begin\{(\w+)\}\s*(\S+)\s*&\s*(\S+)\s*\\\\\s*(\S+)\s*&\s*(\S+)\s*\\end\{\w+\}", gold.strip())
    if found is None or found[3] == found[4]:
        return None
    return rf"\begin{{{found[1]}}} {found[2]} & {found[4]} \\ {found[3]} & {found[5]} \end{{{found[1]}}}"


def _one_root(gold: str) -> str | None:
    return gold.replace(r"\pm", "+") if r"\pm" in gold else None


def _repeated(gold: str) -> str | None:
    """An element twice, for another one."""
    parts = _elements(gold)
    if parts is None or parts[1][0] == parts[1][1] or parts[0].strip().endswith("{"):
        return None
    return parts[0] + ", ".join([parts[1][0], parts[1][0], *parts[1][1:]]) + parts[2]


def _rows(gold: str) -> str | None:
    """The first and the second row of a matrix or vector in each other's place."""
    found = re.fullmatch(r"(\\begin\{\w+\})(.*)(\\end\{\w+\})", gold.strip(), re.DOTALL)
    rows = [row.strip() for row in found[2].split(r"\\")] if found else []
    if len(rows) < 2 or rows[0] == rows[1]:
        return None
    return found[1] + r" \\ ".join([rows[1], rows[0], *rows[2:]]) + found[3]


def _denied(gold: str) -> str | None:
    return rf"\text{{not }} {gold}" if re.fullmatch(r"-?\d+", gold) else None


def _code(gold: str) -> str | None:
    return f"def f(): return {gold}" if re.fullmatch(r"-?\d+", gold) else None


def _letter_case(gold: str) -> str | None:
    """n for N. A lone letter may be that of a choice, whose case means nothing."""
    if re.search(r"\\(?:text|mbox)|^[A-Z]$", gold):
        return None
    return _replace_last(gold, _LETTER.pattern, lambda m: m[0].swapcase())


def _prime(gold: str) -> str | None:
    if re.search(r"\\(?:text|mbox)|^[A-Z]$|'|prime", gold):
        return None
    return _replace_last(gold, _LETTER.pattern, lambda m: m[0] + "'")


def _words_behind(words: str) -> Kind:
    """Words that change the number before them."""
    return lambda gold: rf"{gold}\text{{ {words}}}" if re.fullmatch(r"-?\d+(?:\.\d+)?", gold) and not _is_zero(gold) else None


def _imaginary(gold: str) -> str | None:
    return rf"{gold}\mathrm{{i}}" if re.fullmatch(r"-?\d+", gold) and not _is_zero(gold) else None


def _untrue(gold: str) -> str | None:
    """An equation that does not hold, with the right number last."""
    return f"{int(gold) + 1} = {gold}" if re.fullmatch(r"-?\d+", gold) else None


NEGATIVES: dict[str, Kind] = {
    "digit": _digit, "leading digit": _leading_digit, "sign": _sign, "inner sign": _inner_sign, "variable": _variable, "order": _order,
    "bracket": _bracket, "half-open": _half_open, "set for tuple": _set_for_tuple, "dropped": _dropped, "added": _added, "second answer": _one_of,
    "inverted": _inverted, "exponent": _exponent, "factor": _factor, "magnitude": _magnitude, "unit": _unit, "unit power": _unit_power,
    "word": _word, "choice": _choice, "root": _root, "constant": _constant, "base": _base, "base dropped": _base_dropped,
    "relation": _relation, "union": _union, "union part": _union_part, "transposed": _transposed, "rows": _rows, "denied": _denied, "code": _code,
    "one root": _one_root, "repeated": _repeated, "letter case": _letter_case, "prime": _prime, "imaginary": _imaginary, "untrue": _untrue,
    "million": _words_behind("million"), "or more": _words_behind("or more"), "modulus": _words_behind("(mod 7)"),
}  # fmt: skip


def _if_changed(change: Callable[[str], str]) -> Kind:
    def kind(gold: str) -> str | None:
        changed = change(gold)
        return changed if changed != gold else None

    return kind


def _slash(gold: str) -> str | None:
    """A lone `\\frac{a}{b}` as `a/b`."""
    found = re.fullmatch(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", gold)
    return None if found is None else f"{found[1]}{found[2]}/{found[3]}"


def _decimal(gold: str) -> str | None:
    """A fraction whose decimal ends."""
    found = re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold)
    if found is None or (int(found[2]) * 10**6) % int(found[3]):
        return None
    value = f"{int(found[2]) * 10**6 // int(found[3]):07d}"
    return f"{found[1]}{value[:-6]}.{value[-6:]}".rstrip("0").rstrip(".")


def _trailing_zeros(gold: str) -> str | None:
    return f"{gold}.0" if re.fullmatch(r"-?\d+", gold) else f"{gold}00" if re.fullmatch(r"-?\d*\.\d+", gold) else None


def _thousands(gold: str) -> str | None:
    return f"{int(gold):,}" if re.fullmatch(r"[1-9]\d{3,14}", gold) else None


def _scientific(gold: str) -> str | None:
    found = re.fullmatch(r"(-?\d*\.?\d+)e([+-]?\d+)", gold)
    return None if found is None else rf"{found[1]} \times 10^{{{int(found[2])}}}"


def _with_unit(gold: str) -> str | None:
    return rf"{gold}\text{{ cm}}" if re.fullmatch(r"-?\d+(?:\.\d+)?", gold) else None


def _assignment(gold: str) -> str | None:
    return f"x = {gold}" if re.fullmatch(r"-?\d+(?:\.\d+)?|-?\\frac\{\d+\}\{\d+\}", gold) else None


def _set_order(gold: str) -> str | None:
    parts = _elements(gold)
    if parts is None or parts[0].strip() not in ("", r"\{", r"\left\{"):
        return None
    return parts[0] + ", ".join(reversed(parts[1])) + parts[2]


def _terms(gold: str) -> str | None:
    """A sum of two terms the other way round."""
    found = re.fullmatch(r"([\w\\{}^ ]+?) ?\+ ?([\w\\{}^ ]+)", gold)
    return None if found is None or gold.count("{") != gold.count("}") or found[1].count("{") != found[1].count("}") else f"{found[2]} + {found[1]}"


def _choice_written(gold: str) -> str | None:
    found = re.fullmatch(r"\\text\{\(?([A-E])\)?\}", gold.strip())
    return None if found is None else f"({found[1]})"


def _left_right(gold: str) -> str | None:
    if "(" not in gold or gold.count("(") != gold.count(")") or r"\left" in gold or r"\text" in gold:
        return None
    return gold.replace("(", r"\left(").replace(")", r"\right)")


def _roman(gold: str) -> str | None:
    r"""The imaginary unit and Euler's number upright, as in `\mathrm{i}`."""
    if re.search(r"\\(?:text|mbox)", gold):
        return None
    return _replace_last(gold, r"(?<![A-Za-z\\])[ie](?![A-Za-z_])", lambda m: rf"\mathrm{{{m[0]}}}")


def _counted(gold: str) -> str | None:
    return rf"{gold}\text{{ apples}}" if re.fullmatch(r"-?\d+", gold) else None


POSITIVES: dict[str, Kind] = {
    "same": lambda gold: gold,
    "dollars": lambda gold: None if "$" in gold else f"${gold}$",
    "display": lambda gold: None if "$" in gold else rf"\[{gold}\]",
    "spaces": _if_changed(lambda gold: re.sub(r"(?<=[\w})])\s*([+=])\s*(?=[\w\\(])", r" \1 ", gold)),
    "no spaces": _if_changed(lambda gold: re.sub(r"(?<![A-Za-z\\]) (?![A-Za-z])", "", gold)),
    "dfrac": _if_changed(lambda gold: gold.replace(r"\frac", r"\dfrac")),
    "tfrac": _if_changed(lambda gold: gold.replace(r"\frac", r"\tfrac")),
    "left right": _left_right,
    "no left right": _if_changed(lambda gold: re.sub(r"\\(?:left|right)(?![a-z])", "", gold)),
    "full stop": lambda gold: f"{gold}.",
    "slash": _slash, "decimal": _decimal, "trailing zeros": _trailing_zeros, "thousands": _thousands, "scientific": _scientific,
    "unit": _with_unit, "assignment": _assignment, "set order": _set_order, "terms": _terms, "choice": _choice_written,
    "roman": _roman, "counted": _counted,
    "mbox": _if_changed(lambda gold: gold.replace(r"\text{", r"\mbox{")),
    "textbf": _if_changed(lambda gold: gold.replace(r"\text{(", r"\textbf{(")),
    "bmatrix": _if_changed(lambda gold: gold.replace("{pmatrix}", "{bmatrix}")),
}  # fmt: skip


def perturbed(golds: Iterable[str], kinds: dict[str, Kind]) -> list[tuple[str, str, str]]:
    """(kind, changed answer, gold) for every kind that applies, each once."""
    found: dict[tuple[str, str, str], None] = {}
    for gold in golds:
        for name, kind in kinds.items():
            changed = kind(gold)
            if changed is not None:
                found[name, changed, gold] = None
    return list(found)
