"""Which training problems are a benchmark's: the same words, or half of a benchmark problem's word sequences."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from megatron_antisd.records import Problem

NGRAM = 8
COVERAGE = 0.5
SHORTEST = 4
"""Words: fewer may stand in any text."""

_WORD = re.compile(r"[^\W_]+")


class Decontamination:
    """`benchmarks` by name. A text is contaminated when it has at least `coverage` of the `ngram`-word sequences of one of their problems. One of
    fewer words must stand in it as a whole; one of fewer than SHORTEST words must be all of it."""

    def __init__(self, benchmarks: Mapping[str, Sequence[Problem]], *, ngram: int = NGRAM, coverage: float = COVERAGE) -> None:
        if ngram < 1 or not 0 < coverage <= 1:
            raise ValueError(f"expected ngram >= 1 and 0 < coverage <= 1, got {ngram} and {coverage}")
        self._ngram, self._coverage = ngram, coverage
        self._whole: dict[tuple[str, ...], tuple[str, str]] = {}
        self._short: dict[int, dict[tuple[str, ...], tuple[str, str]]] = defaultdict(dict)
        self._sizes: dict[tuple[str, str], int] = {}
        self._holders: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        for name, problems in benchmarks.items():
            for problem in problems:
                place, all_words = (name, problem.id), words(problem.prompt)
                self._whole.setdefault(all_words, place)
                grams = self._grams(all_words)
                if SHORTEST <= len(all_words) < ngram:
                    self._short[len(all_words)].setdefault(all_words, place)
                self._sizes[place] = len(grams)
                for gram in grams:
                    self._holders[gram].append(place)

    def match(self, text: str) -> tuple[str, str] | None:
        """(benchmark, id of its problem) that `text` repeats, the best covered; None for a clean text."""
        all_words = words(text)
        if all_words in self._whole:
            return self._whole[all_words]
        for size, held in self._short.items():
            found = next((held[part] for part in _windows(all_words, size) if part in held), None)
            if found is not None:
                return found
        shared: Counter[tuple[str, str]] = Counter()
        for gram in self._grams(all_words):
            shared.update(self._holders.get(gram, ()))
        covered = [(count / self._sizes[place], place) for place, count in shared.items() if count >= self._coverage * self._sizes[place]]
        return max(covered)[1] if covered else None

    def _grams(self, all_words: tuple[str, ...]) -> set[tuple[str, ...]]:
        return set(_windows(all_words, self._ngram))


def _windows(all_words: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (all_words[i : i + size] for i in range(len(all_words) - size + 1))


def words(text: str) -> tuple[str, ...]:
    """Lower-case words and numbers, without punctuation and LaTeX's signs."""
    return tuple(_WORD.findall(text.lower()))
