"""Is a response's boxed answer mathematically the reference answer? Extraction here, equivalence by Math-Verify.

Math-Verify guards itself with SIGALRM, which raises outside the main thread and cannot interrupt C code. Its time-outs
are off here; `megatron_antisd.grading.pool` gives real ones, by ending the process. Call these functions directly only
where an answer that takes for ever is acceptable.
"""

from __future__ import annotations

import logging
import re
from typing import NamedTuple

from math_verify import parse, verify

# Without its own time-outs Math-Verify warns once a process that the caller must provide them; the pool does.
logging.getLogger("math_verify").setLevel(logging.ERROR)

THINKING_END = "</think>"

_BRACE_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_INTEGER = re.compile(r"([+-]?)0*(\d+)", re.ASCII)
_DECIMAL = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
# Beside a plain number, `1,000` and `1000,99` are one number; as LaTeX they would be lists of two.
_COMMA_NUMBER = re.compile(r"[+-]?\d+(?:,\d+)+(?:\.\d+)?", re.ASCII)
# What may stand between two boxes that together are one answer: `\boxed{2} \quad \text{and} \quad \boxed{6}`.
_CONNECTIVE = re.compile(r"(?:\s|[$.,;&]|\\[\[\]()]|\\(?:qquad|quad|[,;:! ])|\\(?:text|mbox|textrm)\s*\{[^{}]*\}|\b(?:and|or)\b)*")
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\begin\{(?:align|equation|gather)|\\(?:boxed|fbox)\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[^\W\d_]{3,}[:,]?\s+[^\W\d_]{2,}\s|[^\W\d_]{4,}:\s")


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def grade(response: str, answer: str) -> float:
    """1.0 when the response's last boxed answer equals `answer`, else 0.0.

    Only the text after the last `</think>` counts where there is one; a response without a complete box scores 0.0.
    Boxes that directly follow each other (joined by commas or "and") are also tried as one list, because that is how
    several solutions are often written; the list must then match as a whole. `answer` may be bare, in `$...$` or boxed.
    """
    final = response.rpartition(THINKING_END)[2]
    boxes = _boxes(final)
    if not boxes:
        return 0.0
    gold_boxes = _boxes(answer)
    gold = ", ".join(box.content for box in gold_boxes) if gold_boxes else answer
    if equivalent(boxes[-1].content, gold):
        return 1.0
    run = _last_run(final, boxes)
    return float(len(run) > 1 and equivalent(", ".join(box.content for box in run), gold))


def equivalent(prediction: str, gold: str) -> bool:
    """True when two expressions, with or without `$...$` but without a box, are mathematically equal.

    Not symmetric, as Math-Verify is not: `x = 5` matches the gold `5` and the other way round, but `5` does not match
    the gold `2x + z = 5`. Two integers are compared digit by digit and never reach the parser.
    """
    prediction, gold = _bare(prediction), _bare(gold)
    if not prediction or not gold:
        return False
    if prediction == gold:
        return True
    integers = _INTEGER.fullmatch(prediction), _INTEGER.fullmatch(gold)
    if integers[0] and integers[1]:
        # Exact at any length: the parser's numeric comparison keeps 15 digits, and int() refuses more than 4300.
        return _integer_key(integers[0]) == _integer_key(integers[1])
    if not (_DECIMAL.fullmatch(gold) and _COMMA_NUMBER.fullmatch(prediction)):
        gold, prediction = _as_math(gold), _as_math(prediction)
    parsed_gold, parsed_prediction = parse(gold, parsing_timeout=None), parse(prediction, parsing_timeout=None)
    return bool(verify(parsed_gold, parsed_prediction, timeout_seconds=None))


def _boxes(text: str) -> list[_Box]:
    """Every complete `\\boxed{...}` in the order of its beginning; one pass, braces may nest and may be escaped."""
    found: list[_Box] = []
    open_braces: list[tuple[int, int] | None] = []  # (start of the command, start of the content), None for a plain brace
    for token in _BRACE_TOKEN.finditer(text):
        if token[0] == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                found.append(_Box(opened[0], token.end(), text[opened[1] : token.start()].strip()))
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append((token.start(), token.end()))
    return sorted(found)


def _last_run(text: str, boxes: list[_Box]) -> list[_Box]:
    """The boxes at the end of the list between which only connectives stand."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if box.end > run[0].start or not _CONNECTIVE.fullmatch(text, box.end, run[0].start):
            break
        run.insert(0, box)
    return run


def _bare(text: str) -> str:
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


def _integer_key(match: re.Match[str]) -> tuple[bool, str]:
    digits = match[2]
    return match[1] == "-" and digits != "0", digits


def _as_math(text: str) -> str:
    """The text as Math-Verify should see it: a bare expression becomes `$...$`, text around formulas stays as it is."""
    if _DELIMITED.search(text) or _PROSE.search(_TEXT_COMMAND.sub(" ", text)):
        return text
    return f"${text}$"
