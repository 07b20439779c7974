"""The cases of programming tasks as values. The rollouts of a problem share them; nobody changes them."""

from __future__ import annotations

from typing import Any

from megatron_antisd.grading.literals import parse_literal
from megatron_antisd.grading.verdict import GradingError

MAX_CHARACTERS = 32 << 20
"""Of the text of all cases whose values are kept. Values take up to some thirty times as many bytes."""

Cases = tuple[tuple[str, str], ...]
Values = tuple[list[Any], list[Any]]


class ParsedCases:
    """Keeps the values of the cases that were used last, by the characters of their text."""

    def __init__(self, max_characters: int = MAX_CHARACTERS) -> None:
        self._max, self._characters = max_characters, 0
        self._kept: dict[tuple[Cases, bool], tuple[Values, int]] = {}

    def get(self, cases: Cases, literals: bool) -> Values:
        """(inputs, expected): values where the texts are `literals`. Raises GradingError for a text that is none."""
        found = self._kept.pop((cases, literals), None)
        if found is None:
            found = (_literals(cases) if literals else ([given for given, _ in cases], [wanted for _, wanted in cases]),
                     sum(len(given) + len(wanted) for given, wanted in cases))
            self._characters += found[1]
        self._kept[cases, literals] = found  # a dict keeps its order: the last one used stands at the end
        while self._characters > self._max and len(self._kept) > 1:
            self._characters -= self._kept.pop(next(iter(self._kept)))[1]
        return found[0]

    def __len__(self) -> int:
        return len(self._kept)


def _literals(cases: Cases) -> Values:
    try:
        inputs = [parse_literal(given) for given, _ in cases]
        expected = [parse_literal(wanted) for _, wanted in cases]
    except ValueError as error:
        raise GradingError(f"a test case is {error}; CodeTests.cases of a function hold Python literals") from error
    for arguments in inputs:
        if not isinstance(arguments, tuple):
            raise GradingError(f"the input of a test case is {arguments!r:.100}, expected the tuple of the function's arguments")
    return inputs, expected
