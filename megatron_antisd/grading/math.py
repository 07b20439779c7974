"""Is a response's boxed answer mathematically the reference answer?

`boxes` finds the answer, `notation` takes typography away, `exact` decides numbers, words and choices, `structure`
refuses what cannot be equal, and Math-Verify decides the rest, with what it is known to take wrongly checked again here.

Math-Verify guards itself with SIGALRM, which raises outside the main thread and cannot interrupt C code. Its time-outs
are off here; `megatron_antisd.grading.pool` gives real ones, by ending the process. Call these functions directly only
where an answer that takes for ever is acceptable.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy, normalize_latex
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Derivative, E, Eq, Expr, Float, Function, Symbol, UnevaluatedExpr

from megatron_antisd.grading.boxes import boxed_list, final_answer
from megatron_antisd.grading.exact import exact_verdict
from megatron_antisd.grading.notation import bare, key, normalised
from megatron_antisd.grading.structure import MAX_DEPTH, as_interval, contradiction, depth, is_interval, repeated, sides
from megatron_antisd.grading.units import meaning, split_words, strip_unit

# Without its own time-outs Math-Verify warns once a process that the caller must provide them; the pool does.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_PARSED_CHARACTERS = 1000
"""Of a boxed answer or a gold that are handed to the parser, whose time grows faster than the length. A longer one is right only
when it is the gold's own text."""
MAX_SENTENCE_CHARACTERS = 10_000
"""Of anything that are looked at: only the end of a longer sentence is read, and a longer box must be the gold's own text."""
CACHED_EXPRESSIONS = 4096
"""Parsed golds and answers that a process keeps: the rollouts of a group share their gold, and often their answer."""
RELATIVE_TOLERANCE = 1e-5
"""Of two numbers that the parser takes for equal because of its 6 decimals."""

_LATEX_ONLY = (LatexExtractionConfig(),)
_NORMALIZATION = LatexExtractionConfig().normalization_config
# n and N are two variables; by default the parser reads both as n.
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_DELIMITED = re.compile(r"(?<!\\)\$|\\\(|\\\[|\\begin\{(?:align|equation|gather)|\\(?:boxed|fbox)\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"(?<![^\W\d_])(?:[^\W\d_]{3,}[:,]?\s+[^\W\d_]{2,}\s|[^\W\d_]{2,}'[a-z]+\s|[^\W\d_]{4,}:\s)")

_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"[A-Za-z]")
# Commands that stand for something unknown or in words.
_PLACEHOLDER = re.compile(r"\\(?!d?frac|tfrac|sqrt|cdot|times|binom|left|right|pi|infty|log|ln|sin|cos|tan|pm|div)[A-Za-z]+|\|")


def grade(response: str, answer: str) -> float:
    """1.0 when the response's last boxed answer equals `answer`, else 0.0.

    Only the text after the last `</think>` counts where there is one; a response without a complete box scores 0.0.
    Boxes that directly follow each other (joined by commas or "and") are also tried as one list, because that is how
    several solutions are often written; the list must then match as a whole. `answer` may be bare, in `$...$` or boxed.
    """
    found = final_answer(response)
    if found is None:
        return 0.0
    boxed = boxed_list(answer)
    gold = answer if boxed is None else boxed
    if _equal(found.text, gold, sentence=found.stated and len(found.text) <= MAX_PARSED_CHARACTERS):
        return 1.0
    return float(found.joined is not None and _equal(found.joined, gold, sentence=False))


def equivalent(prediction: str, gold: str) -> bool:
    """True when two expressions, with or without `$...$` but without a box, are mathematically equal.

    Not symmetric, as Math-Verify is not: `x = 5` matches the gold `5` and the other way round, but `5` does not match
    the gold `2x + z = 5`. The prediction may be a sentence; its last formula or number is then its answer.
    """
    return _equal(prediction, gold, sentence=True)


def _equal(prediction: str, gold: str, *, sentence: bool) -> bool:
    """`sentence`: an answer may be searched for within the prediction's words. Inside a box it may not."""
    if len(gold) > MAX_SENTENCE_CHARACTERS or (len(prediction) > MAX_SENTENCE_CHARACTERS and not sentence):
        return bool(gold.strip()) and prediction.strip() == gold.strip()
    prediction = prediction[-MAX_SENTENCE_CHARACTERS:]
    left, right = normalised(prediction), normalised(gold)
    if not left or not right:
        return False
    if key(left) == key(right):
        return True
    left, right = _same_notation(left, right)
    verdict = exact_verdict(left, right)
    if verdict is not None:
        return verdict
    if sentence and _is_prose(left):
        return not _case_differs(left, right) and _any_same(_read_prose(f"${strip_unit(right)}$"), _read_prose(bare(prediction)))
    return parsed_equal(left, right)


def parsed_equal(prediction: str, gold: str) -> bool:
    """The verdict on two normalised answers by structure and parser alone, without the fast paths."""
    if max(len(prediction), len(gold)) > MAX_PARSED_CHARACTERS or max(depth(prediction), depth(gold)) > MAX_DEPTH:
        return False
    if contradiction(prediction, gold) or _case_differs(prediction, gold) or _untrue(prediction, gold) or not _same_repeated(prediction, gold):
        return False
    if meaning(prediction) and meaning(prediction) == meaning(gold):
        prediction, gold = split_words(prediction)[0], split_words(gold)[0]
    return _any_same(_parsed(gold, True), _parsed(prediction, False))


def _same_notation(prediction: str, gold: str) -> tuple[str, str]:
    """An inequality as an interval where the other answer is one."""
    left, right = as_interval(prediction), as_interval(gold)
    if left and is_interval(gold):
        return left, gold
    return (prediction, right) if right and is_interval(prediction) else (prediction, gold)


def _case_differs(prediction: str, gold: str) -> bool:
    r"""The parser reads `\Gamma` and `\gamma` as one constant: where both occur, both answers must have as many of each."""
    counts = [[len(re.findall(rf"\\{name}(?![A-Za-z])", text)) for name in ("Gamma", "gamma")] for text in (prediction, gold)]
    return counts[0] != counts[1] and all(one + other for one, other in zip(*counts, strict=True))


def _untrue(prediction: str, gold: str) -> bool:
    """`4 = 5`: a first side that is a constant must be the last. And two equations without a letter say nothing to compare."""
    chains = sides(prediction), sides(gold)
    if all(len(chain) > 1 and _is_constant(chain) for chain in chains):
        return True
    chain = chains[0]
    if len(chain) == 1 or not _is_constant(chain[:1]):
        return False
    return not any(_same(one, other) for one in _parsed(chain[0], False)[:1] for other in _parsed(chain[-1], False)[:1])


def _is_constant(chain: list[str]) -> bool:
    return all(side and not _LETTER.search(_COMMAND.sub(" ", side)) and not _PLACEHOLDER.search(side) for side in chain)


def _same_repeated(prediction: str, gold: str) -> bool:
    """Bare lists repeat the same elements as often; the parser's sets would forget how often."""
    left, right = repeated(prediction), repeated(gold)
    if left is None or right is None or not (left or right):
        return True
    if len(left) != len(right):
        return False
    pairs = [[one == other or _equal(one, other, sentence=False) for other in right] for one in left]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _any_same(golds: tuple[Any, ...], predictions: tuple[Any, ...]) -> bool:
    return any(_same(one, other) for one in golds for other in predictions)


@lru_cache(maxsize=CACHED_EXPRESSIONS)
def _parsed(text: str, sentence: bool) -> tuple[Any, ...]:
    """What the parser reads in a normalised answer: at most one expression, and its text."""
    if _is_prose(text):
        return _read_prose(text) if sentence else ()
    # As LaTeX or not at all: where that fails, Math-Verify would look for any number in it.
    latex = normalize_latex(strip_unit(text), config=_NORMALIZATION)
    last = sides(latex)[-1]
    for part in dict.fromkeys((latex, last)):
        try:
            found = latex2sympy(part, is_real=not should_treat_as_complex(part), convert_degrees=False, normalization_config=None,
                                conversion_config=_CONVERSION)  # fmt: skip
            return (found, latex)
        except Exception:  # the parser raises whatever its grammar, SymPy or Python meet
            continue
    return (latex,)


def _read_prose(text: str) -> tuple[Any, ...]:
    return tuple(parse(text, parsing_timeout=None))


def _is_prose(text: str) -> bool:
    return bool(_DELIMITED.search(text) or _PROSE.search(_TEXT_COMMAND.sub(" ", text)))


def _same(gold: Any, prediction: Any) -> bool:
    if isinstance(gold, Basic) and isinstance(prediction, Basic):
        if _symbols_differ_in_case(gold, prediction):
            return False
        if _derivatives(gold) != _derivatives(prediction) or _numerically_apart(gold, prediction):
            return False
        if isinstance(gold, Eq) and isinstance(prediction, Eq) and gold.atoms(Function) and prediction.atoms(Function):
            # Solving such equations for each variable, as Math-Verify would, takes minutes: only the difference of their sides counts.
            one, other = gold.lhs - gold.rhs, prediction.lhs - prediction.rhs
            return any(not _numerically_apart(one, side) and verify([one], [side], timeout_seconds=None) for side in (other, -other))
    return bool(verify([gold], [prediction], timeout_seconds=None))


def _symbols_differ_in_case(gold: Basic, prediction: Basic) -> bool:
    """A variable of one answer stands in the other in the other case only. Math-Verify itself compares some names without it."""
    left, right = _names(gold), _names(prediction)
    lowered = {name.lower() for name in left - right} & {name.lower() for name in right - left}
    return bool(lowered)


def _names(expression: Basic) -> set[str]:
    names = {symbol.name for symbol in expression.atoms(Symbol)}
    return names | {"e"} if expression.has(E) else names


def _derivatives(expression: Basic) -> set[Basic]:
    """`dy/dx` of two plain variables: evaluated, it would be 0, whatever the variables."""
    return {found for found in expression.atoms(Derivative) if isinstance(found.expr, Symbol)}


def _numerically_apart(gold: Basic, prediction: Basic) -> bool:
    """Two constants, or two expressions at one point, whose values are surely not the same: no need to simplify."""
    if not isinstance(gold, Expr) or not isinstance(prediction, Expr) or gold.is_Symbol or prediction.is_Symbol:
        return False
    if gold.has(UnevaluatedExpr) or prediction.has(UnevaluatedExpr):
        return False  # percentages, which the parser takes for their number as well
    symbols = sorted(gold.free_symbols | prediction.free_symbols, key=str)
    point = {symbol: Float(0.37 + 0.61803 * place) for place, symbol in enumerate(symbols)}
    try:
        values = [complex(one.doit().subs(point).evalf()) for one in (gold, prediction)]
        # False for nan as well.
        return abs(values[0] - values[1]) > RELATIVE_TOLERANCE * max(map(abs, values))
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return False  # no number at this point: the parser decides
