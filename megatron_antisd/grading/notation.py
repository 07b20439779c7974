"""One spelling for one thing: what is only typography of an answer is taken away before anything is compared."""

from __future__ import annotations

import re

_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "°": r"^\circ ", "²": "^2", "³": "^3", "√": r"\sqrt ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "，": ",", "（": "(", "）": ")", "：": ":",
    "％": "%", "\x00": " ", "\u200b": "", "\ufeff": "",
})  # fmt: skip
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!\s*", ""),
        (r"\{,\}", ","),
        (r"(?<=\d)\\,(?=\d{3}(?!\d))", ","),  # 1\,000
        (r"(?<!\\)\\(?:[,;: ]|qquad(?![A-Za-z])|quad(?![A-Za-z])|displaystyle(?![A-Za-z])|limits(?![A-Za-z]))|~", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])(?:\s*\.)?\s*", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|textnormal|textrm|textbf|textit|textsf|texttt)\s*\{", r"\\text{"),
        (r"\\leq(?![A-Za-z])", r"\\le "),
        (r"\\geq(?![A-Za-z])", r"\\ge "),
        (r"\\neq(?![A-Za-z])", r"\\ne "),
        (r"(?<=[A-Za-z])\\(?:text|mathrm|operatorname)\{([ie])\}|(?<=[A-Za-z])\\mathrm\{(d)\}", r" \1\2"),
        (r"\\(?:text|mathrm|operatorname)\{([ie])\}|\\mathrm\{(d)\}", r"\1\2"),
        (r"(?<=\w)\s*\\text\s*\{\s*\(?\s*base\s+(\w+)\s*\)?\s*\}$", r"_{\1}"),
        (r"\^\s*\{\s*\\prime\s*\}|\^\s*\\prime(?![A-Za-z])", "'"),
        (r"\^\s*\{\s*\\prime\s*\\prime\s*\}", "''"),
        (r"\\(?:ldots|cdots|dotsc|dotsb)(?![A-Za-z])", r"\\dots "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\langle(?![A-Za-z])\s*", "("),
        (r"\s*\\rangle(?![A-Za-z])", ")"),
        (r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}|(?<!\w)(\d+)\s*\\choose\s*(\d+)", r"\\binom{\1\3}{\2\4}"),
        (r"\\frac\s*(\\(?:pi|theta|alpha|beta|lambda|omega|phi))\s*(?:(\w)|(?=\{))", r"\\frac{\1}\2"),
        (r"(\\frac\{\\[a-z]+\})(\w)", r"\1{\2}"),
        (r"^(?:\\text\s*\{)?\s*(\d{1,2}:\d\d)\s*(?:\\text\s*\{)?\s*[aA]\.?[mM]\.?\s*\}?$", r"\1\\text{ AM}"),
        (r"^(?:\\text\s*\{)?\s*(\d{1,2}:\d\d)\s*(?:\\text\s*\{)?\s*[pP]\.?[mM]\.?\s*\}?$", r"\1\\text{ PM}"),
        (r"\^\s*\{\s*\\(?:circ|degree)\s*\}|\^\s*\\(?:circ|degree)(?![A-Za-z])|\\degree(?![A-Za-z])", r"^\\circ "),
        (r"(?<=\d)\.(?=\s*(?:[/*+})]|-|$))", ""),  # 1./3
        (r"(?<![\w.}^_\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?)0*(\d{1,4})(?![\w.])", r"\1 \\times 10^{\2\3}"),
    )
)
_NEGATIVE_ZEROS = re.compile(r"\{\+(?=\d)")
# Not a space that ends a command or separates two numbers or words.
_IDLE_SPACE = re.compile(r"(?<![A-Za-z\d\\]) | (?![A-Za-z\d])|(?<=\d) (?=[A-Za-z])")
_LEADING_PHRASE = re.compile(r"(?i:\\text\s*\{\s*)?(?i:the\s+)?(?i:final\s+)?(?i:answer)(?i:\s+is\s*:?|\s*:)\s*(?:\}\s*)?")


def bare(text: str) -> str:
    """Without one pair of math delimiters around the whole, and with every run of white space as one space."""
    text = " ".join(text.split())
    for opening, closing in _WRAPPERS:
        inner = text[len(opening) : -len(closing)]
        if text != opening + inner + closing:
            continue
        # `$1$ and $2$` begins and ends with a delimiter too, but is two formulas; `\$` inside is only money.
        if opening not in inner.replace(r"\$", ""):
            return inner.strip()
    return text


def normalised(text: str) -> str:
    r"""An answer in the spelling that the rest of the grader knows.

    `\left`, `\right`, thin spaces, `\dfrac`, `\mbox`, Unicode signs, a full stop at the end, delimiters around the whole and
    "The answer is" before it are gone; `1e-5` is `1 \times 10^{-5}`. No value changes.
    """
    text = bare(text.translate(_UNICODE))
    text = bare(_without_end_marks(text))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _NEGATIVE_ZEROS.sub("{", text)
    text = _LEADING_PHRASE.sub("", text, count=1) if _LEADING_PHRASE.match(text) else text
    return bare(_without_end_marks(text))


def key(text: str) -> str:
    """Equal keys of two normalised answers mean the same text but for spaces that separate nothing."""
    return _IDLE_SPACE.sub("", text)


def _without_end_marks(text: str) -> str:
    """Without full stops, commas and lone backslashes at the end, unless they are part of a command or an ellipsis."""
    while text and (text[-1] in ",;" or (text[-1] == "." and not text.endswith("..")) or (text[-1] == "\\" and not text.endswith(r"\\"))):
        text = text[:-1].rstrip()
        if text.endswith("\\"):  # `\,` and `\;` are spaces
            text = text[:-1].rstrip()
    return text
