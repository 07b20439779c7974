"""The quickstart's task: find the one candidate x with a*x + b = c (mod 11).

A problem is one line of words, `solve 3 5 9 2 7 0 1 a4 b7 c2`: seven candidates, then the coefficients. The candidates come first, so
a model that reads left to right cannot test them while it reads the prompt: it has to test them in its response. A response
either jumps to an answer or deliberates:

    so \\boxed{5}
    try 3 1 8 6 wait check 9 3 10 8 hmm let 7 6 2 0 holds so \\boxed{7}

`try 3 1 8 6` reads: candidate 3, a*3 = 1, a*3 + b = 8, a*3 + b - c = 6 (mod 11); a rest of 0 is a match. The answer is the number in
the last \\boxed{}. Each role has several synonyms, so that deliberation carries entropy, as it does in natural language.

Besides the problems this file makes the demonstrations that the base model is pretrained on. Most plain demonstrations jump to a
guess (so the base model is poor, but able to deliberate), and demonstrations that see a solution mostly jump to it (so the
teacher prefers the shortcut): the two habits between which reinforcement learning has to choose.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MODULUS = 11
CANDIDATES = 7
QUESTION = "solve"
TRY = ("try", "check", "let", "suppose", "consider", "maybe", "perhaps", "test")
WAIT = ("wait", "hmm", "no", "but", "however", "alternatively", "actually", "instead")
OK = ("holds", "works", "matches", "fits")
ANS = ("so", "thus", "hence", "therefore")
PRIVILEGED_WORDS = ("PREV", "ASSESS", "CORRECT", "INCORRECT", "NOW")
PRIVILEGED_TEMPLATE = "{problem} PREV {solution} ASSESS {feedback} NOW"
END_WORD = "<eos>"
NUMBERS = tuple(str(value) for value in range(MODULUS))
BOXED = tuple(f"\\boxed{{{value}}}" for value in range(MODULUS))
MAX_DEMO_WORDS = 56

Split = Literal["train", "eval"]


def words() -> list[str]:
    """Every word of the task, in the order of the vocabulary."""
    coefficients = [f"{name}{value}" for name in "abc" for value in range(MODULUS)]
    return [QUESTION, *PRIVILEGED_WORDS, *TRY, *WAIT, *OK, *ANS, *NUMBERS, *coefficients, *BOXED]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """a*x + b = c (mod 11) with exactly one root among `candidates`. Example: `Equation(a=4, b=7, c=2, candidates=(3, 5, ...))`."""

    a: int
    b: int
    c: int
    candidates: tuple[int, ...]

    @property
    def root(self) -> int:
        roots = [value for value in self.candidates if self.value(value) == self.c]
        if len(roots) != 1:
            raise ValueError(f"{self.text!r} has {len(roots)} roots among its candidates, expected exactly one")
        return roots[0]

    @property
    def text(self) -> str:
        return " ".join([QUESTION, *map(str, self.candidates), f"a{self.a}", f"b{self.b}", f"c{self.c}"])

    @property
    def split(self) -> Split:
        """`eval` for one problem in eight, decided by a hash of the text: the splits are disjoint whatever the seeds."""
        return "eval" if hashlib.sha256(self.text.encode()).digest()[0] < 32 else "train"

    def value(self, candidate: int) -> int:
        return (self.a * candidate + self.b) % MODULUS


def parse_problem(text: str) -> Equation:
    """The inverse of `Equation.text`. Raises ValueError with what was got."""
    pattern = rf"{QUESTION} ((?:\d+ ){{{CANDIDATES}}})a(\d+) b(\d+) c(\d+)"
    match = re.fullmatch(pattern, text)
    if match is None:
        raise ValueError(f"not a problem of this task: {text!r}; expected e.g. 'solve 3 5 9 2 7 0 1 a4 b7 c2'")
    return Equation(candidates=tuple(map(int, match[1].split())), a=int(match[2]), b=int(match[3]), c=int(match[4]))


def sample_problem(rng: random.Random, split: Split | None = None) -> Equation:
    """A random problem, of `split` when one is named."""
    while True:
        a, b = rng.randrange(1, MODULUS), rng.randrange(MODULUS)
        candidates = tuple(rng.sample(range(MODULUS), CANDIDATES))
        root = rng.choice(candidates)
        problem = Equation(a=a, b=b, c=(a * root + b) % MODULUS, candidates=candidates)
        if split is None or problem.split == split:
            return problem


def answer_of(response: str) -> int | None:
    """The number in the response's last \\boxed{}, or None."""
    found = re.findall(r"\\boxed\{(\d+)\}", response)
    return int(found[-1]) if found else None


def is_correct(problem: Equation, response: str) -> bool:
    return answer_of(response) == problem.root


def privileged_text(problem: Equation, solution: str, correct: bool) -> str:
    """The teacher's user turn, as the run's privileged template makes it."""
    return PRIVILEGED_TEMPLATE.format(problem=problem.text, solution=solution, feedback="CORRECT" if correct else "INCORRECT")


def answer(value: int, rng: random.Random) -> list[str]:
    return [rng.choice(ANS), BOXED[value]]


def attempt(problem: Equation, candidate: int, rng: random.Random, slip: float = 0.0) -> tuple[list[str], bool]:
    """One test of a candidate, and whether it matches: the product a*x, the sum a*x + b and the rest a*x + b - c, which is 0 on a match.
    With probability `slip` each, product and sum are random."""
    product = problem.a * candidate % MODULUS
    if rng.random() < slip:
        product = rng.randrange(MODULUS)
    total = (product + problem.b) % MODULUS
    if rng.random() < slip:
        total = rng.randrange(MODULUS)
    rest = (total - problem.c) % MODULUS
    return [rng.choice(TRY), str(candidate), str(product), str(total), str(rest)], rest == 0


def drill(problem: Equation, rng: random.Random) -> str:
    """Every candidate once, from a random one on, with its product, value and rest: `3 1 8 6 5 9 5 3 ...`."""
    start = rng.randrange(CANDIDATES)
    order = problem.candidates[start:] + problem.candidates[:start]
    return " ".join(f"{value} {problem.a * value % MODULUS} {problem.value(value)} {(problem.value(value) - problem.c) % MODULUS}"
                    for value in order)


def reference_solution(problem: Equation, rng: random.Random) -> str:
    """A short right solution: test the root, then answer."""
    return " ".join([*attempt(problem, problem.root, rng)[0], rng.choice(OK), *answer(problem.root, rng)])


@dataclass(frozen=True, kw_only=True)
class CorpusMix:
    """How often the demonstrations do what; probabilities."""

    drill: float = 0.0
    """Arithmetic drills instead of solutions: every candidate with its two results."""
    privileged: float = 0.5
    """Of the others: demonstrations in the privileged format."""
    shortcut: float = 0.75
    """Plain: jump to a guess."""
    give_up: float = 0.35
    """Plain, at a mismatch: guess instead of the next attempt."""
    jump: float = 0.1
    """Plain: the next candidate is random instead of the next of the list, so it may have been refuted already."""
    slip: float = 0.02
    """Plain: a result of the arithmetic is random."""
    false_match: float = 0.04
    """Plain, at a mismatch: claim a match."""
    privileged_shortcut: float = 0.88
    """Privileged: jump to the shown answer."""
    privileged_use: float = 0.7
    """Privileged deliberation: the attempt tests the shown answer."""
    privileged_jump: float = 0.85
    """Privileged deliberation, at a mismatch: jump to the shown answer."""
    privileged_ignore: float = 0.08
    """Privileged: behave as if nothing were shown."""
    privileged_wrong: float = 0.04
    """Privileged: the shown answer is wrong and assessed so, and is not tried again."""


DRILL_MIX = CorpusMix(drill=1.0)
"""The first stage: three of four tokens are facts of the arithmetic, so it is learned in a few hundred steps."""
ARITHMETIC_MIX = CorpusMix(drill=0.2, privileged=0.3, shortcut=0.0, give_up=0.0, jump=0.0, slip=0.0, false_match=0.0, privileged_shortcut=0.2,
                           privileged_use=0.3, privileged_jump=0.9)
"""The second stage: mostly deliberation without faults, so the arithmetic moves into the format of solutions."""


def deliberation(problem: Equation, mix: CorpusMix, rng: random.Random, refuted: tuple[int, ...] = ()) -> str:
    """Test candidates until one matches, or give up with a guess; `refuted` are not tested. The first candidate is random, then
    the list is followed in its order and around its end, but for random jumps."""
    pool = [value for value in problem.candidates if value not in refuted]
    out: list[str] = []
    tried: set[int] = set()
    position = rng.randrange(len(pool))
    while True:
        candidate = pool[position]
        tried.add(candidate)
        step, matches = attempt(problem, candidate, rng, mix.slip)
        out += step
        if matches or rng.random() < mix.false_match:
            return " ".join([*out, rng.choice(OK), *answer(candidate, rng)])
        if rng.random() < mix.give_up or len(out) + 8 > MAX_DEMO_WORDS:
            left = [value for value in pool if value not in tried] or pool
            return " ".join([*out, *answer(rng.choice(left), rng)])
        out.append(rng.choice(WAIT))
        position = rng.randrange(len(pool)) if rng.random() < mix.jump else (position + 1) % len(pool)


def informed_deliberation(problem: Equation, mix: CorpusMix, rng: random.Random) -> str:
    """Deliberation by someone who was shown the right answer."""
    out: list[str] = []
    tried: set[int] = set()
    while True:
        others = [value for value in problem.candidates if value not in tried]
        use = problem.root not in tried and rng.random() < mix.privileged_use
        candidate = problem.root if use else rng.choice(others)
        tried.add(candidate)
        step, matches = attempt(problem, candidate, rng)
        out += step
        if matches:
            return " ".join([*out, rng.choice(OK), *answer(candidate, rng)])
        if rng.random() < mix.privileged_jump or len(out) + 8 > MAX_DEMO_WORDS:
            return " ".join([*out, *answer(problem.root, rng)])
        out.append(rng.choice(WAIT))


def plain_response(problem: Equation, mix: CorpusMix, rng: random.Random) -> str:
    if rng.random() < mix.shortcut:
        return " ".join(answer(rng.choice(problem.candidates), rng))
    return deliberation(problem, mix, rng)


def shown_solution(problem: Equation, mix: CorpusMix, rng: random.Random) -> str:
    """A right solution as a peer rollout or the data set would give it: shortcut, reference or deliberation."""
    kind = rng.random()
    if kind < 0.3:
        return " ".join(answer(problem.root, rng))
    if kind >= 0.5:
        for _ in range(8):
            solution = deliberation(problem, mix, rng)
            if is_correct(problem, solution):
                return solution
    return reference_solution(problem, rng)


def privileged_demo(problem: Equation, mix: CorpusMix, rng: random.Random) -> tuple[str, str]:
    """(user turn, response) in the privileged format. The assessment speaks of the response that is to be scored, not of the shown
    solution, so it is a coin where the shown solution is right."""
    if rng.random() < mix.privileged_wrong:
        wrong = rng.choice([value for value in problem.candidates if value != problem.root])
        text = privileged_text(problem, " ".join(answer(wrong, rng)), False)
        return text, deliberation(problem, mix, rng, refuted=(wrong,))
    text = privileged_text(problem, shown_solution(problem, mix, rng), rng.random() < 0.5)
    if rng.random() < mix.privileged_ignore:
        return text, plain_response(problem, mix, rng)
    if rng.random() < mix.privileged_shortcut:
        return text, " ".join(answer(problem.root, rng))
    return text, informed_deliberation(problem, mix, rng)


def demonstrations(mix: CorpusMix, seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (user turn, response) over training problems; equal seeds give equal streams."""
    rng = random.Random(f"demonstrations-{seed}")
    while True:
        problem = sample_problem(rng, "train")
        if rng.random() < mix.drill:
            yield problem.text, drill(problem, rng)
        elif rng.random() < mix.privileged:
            yield privileged_demo(problem, mix, rng)
        else:
            yield problem.text, plain_response(problem, mix, rng)


def write_problems(path: str | Path, count: int, seed: int, split: Split) -> None:
    """Write `count` different problems as JSON lines of {id, problem, answer, solution}; `answer` and `solution` are text."""
    rng = random.Random(f"problems-{split}-{seed}")
    seen: dict[str, Equation] = {}
    while len(seen) < count:
        problem = sample_problem(rng, split)
        seen[problem.text] = problem
    with Path(path).open("w") as file:
        for index, (text, problem) in enumerate(seen.items()):
            row = {"id": f"{split}-{index}", "problem": text, "answer": str(problem.root), "solution": reference_solution(problem, rng)}
            file.write(json.dumps(row) + "\n")


def kinds(problem_text: str, response_text: str) -> list[str]:
    """The role of every word of a response, in order: `TRY:first`, `TRY`, `WAIT`, `OK`, `ANS:first`, `ANS:afterOK`, `ANS:giveup`,
    `candidate` (the value under test), `calc` (a result), `answer:right`, `answer:wrong`, `eos`, `other`. One word is one token."""
    root = parse_problem(problem_text).root
    out: list[str] = []
    previous = ""
    for position, word in enumerate(response_text.split()):
        out.append(_kind(word, previous, position == 0, root))
        previous = word
    return out


def _kind(word: str, previous: str, first: bool, root: int) -> str:
    if word in TRY:
        return "TRY:first" if first else "TRY"
    if word in ANS:
        return "ANS:first" if first else "ANS:afterOK" if previous in OK else "ANS:giveup"
    if word in BOXED:
        return "answer:right" if word == BOXED[root] else "answer:wrong"
    if word in NUMBERS:
        return "candidate" if previous in TRY else "calc"
    return "WAIT" if word in WAIT else "OK" if word in OK else "eos" if word == END_WORD else "other"
