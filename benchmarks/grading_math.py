"""How many math answers a second the grading pool takes: `python -m benchmarks.grading_math`.

The mix is that of training and evaluation: 8 responses a problem, half of them right (the gold, in part written another way), half wrong
(the gold perturbed), 2,000 characters of reasoning before the box. With ANTISD_DATA set, 2 of 5 problems are of DAPO (integers), the others of
MATH-500, AIME, HMMT and MinervaMath; without it, of a self-written set of golds. Three measurements:

* `pool`: `GradingPool` with 2 workers.
* `pool, hangs`: the same with 1 answer in 1,000 replaced by one that keeps the parser busy for ever, a real hang inside SymPy that only the
  worker's death ends. Each costs one worker the whole time-out and a new start, so the time-out decides this rate: the default of
  `grading.timeout_seconds` here, `--timeout` for another.
* `Math-Verify`: `parse` and `verify` of the same responses in one process, its own time-outs on, as its users call it.

Goals: at least 300 answers/s on 2 cores, half of that with hangs. Prints how often Math-Verify's verdict differs from what was made.
`--rates` instead counts the wrong verdicts by kind of perturbation over the golds of MATH-500, AIME, HMMT and MinervaMath (the
self-written ones without data), of this grader and of Math-Verify on the same boxes, some minutes in all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.launch import machine
from megatron_antisd.config import GradingConfig
from megatron_antisd.grading import GradingPool, GradingTask
from tests.grading.perturbations import GOLDS, NEGATIVES, POSITIVES, perturbed

GOAL, GOAL_WITH_HANGS = 300.0, 150.0
GROUP = 8
REASONING = "We look at the cases one after the other, since $x^2 + 1 > 0$ for each of them, and count. " * 22
# The digits of this sum's terms are written out by no one: evaluating it takes hours and little memory.
ENDLESS = r"\sum_{k=1}^{10^9} \lfloor \frac{10^9}{k^2+1} \rfloor"
DATA = {"train/dapo_math_17k.jsonl": 0.4, "eval/math500.jsonl": 0.3, "eval/minerva_math.jsonl": 0.15, "eval/hmmt_feb2025.jsonl": 0.08,
        "eval/aime2025.jsonl": 0.07}  # fmt: skip


def golds(count: int, chance: random.Random) -> list[str]:
    """`count` reference answers, from ANTISD_DATA where it is set."""
    root = os.environ.get("ANTISD_DATA")
    if root is None:
        return [chance.choice((*GOLDS, str(chance.randrange(1, 1000)))) for _ in range(count)]
    found: list[str] = []
    for name, share in DATA.items():
        answers = [str(json.loads(line)["answer"]) for line in (Path(root) / name).read_text().splitlines()]
        found += chance.choices(answers, k=max(1, round(share * count)))
    chance.shuffle(found)
    return found[:count]


def mix(count: int, chance: random.Random) -> list[tuple[GradingTask, bool]]:
    """`count` answers and whether each is right, the responses of a problem beside each other."""
    found: list[tuple[GradingTask, bool]] = []
    for gold in golds(-(-count // GROUP), chance):
        right = [text for _, text, _ in perturbed([gold], POSITIVES)]
        wrong = [text for _, text, _ in perturbed([gold], NEGATIVES)] or ["977"]
        for place in range(GROUP):
            correct = place % 2 == 0
            # As models answer: mostly the plain form.
            text = (gold if chance.random() < 0.5 else chance.choice(right)) if correct else chance.choice(wrong)
            response = f"{REASONING}</think>\n{REASONING[:200]} Therefore the answer is $\\boxed{{{text.strip('$')}}}$."
            found.append((GradingTask(response=response, answer=gold), correct))
    return found[:count]


def with_hangs(tasks: Sequence[GradingTask], every: int) -> list[GradingTask]:
    """The tasks with every `every`-th one answered by what the parser never finishes."""
    endless = GradingTask(response=rf"</think>$\boxed{{{ENDLESS}}}$", answer=r"\sqrt{2}")
    return [endless if place % every == every // 2 else task for place, task in enumerate(tasks)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table."""

    answers: int
    seconds: float
    processor: float
    """Processor seconds; those of a pool's workers include their start."""
    rewards: list[float]
    timeouts: int = 0

    @property
    def rate(self) -> float:
        return self.answers / self.seconds


def pool_rate(tasks: Sequence[GradingTask], workers: int, timeout: float) -> Measured:
    """A pool that has started, from the first answer to the last."""
    used = _children_seconds()
    with GradingPool(workers=workers, timeout_seconds=timeout) as pool:
        start = time.perf_counter()
        report = pool.grade_many(tasks)
        seconds = time.perf_counter() - start
    return Measured(answers=len(tasks), seconds=seconds, processor=_children_seconds() - used, timeouts=report.timeouts,
                    rewards=[verdict.reward for verdict in report.verdicts])  # fmt: skip


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def math_verify_rate(tasks: Sequence[GradingTask]) -> Measured:
    """Parse and verify called one after the other, golds parsed each time."""
    from math_verify import parse, verify

    parse("$1$")
    start, used = time.perf_counter(), time.process_time()
    rewards = [float(verify(parse(f"${task.answer}$"), parse(task.response))) for task in tasks]
    return Measured(answers=len(tasks), seconds=time.perf_counter() - start, processor=time.process_time() - used, rewards=rewards)


def print_rates() -> int:
    """A table of wrong verdicts by kind."""
    root = os.environ.get("ANTISD_DATA")
    names = ("aime2024", "aime2025", "aime2026", "hmmt_feb2025", "math500", "minerva_math")
    files = [Path(root) / "eval" / f"{name}.jsonl" for name in names] if root else []
    found = [str(json.loads(line)["answer"]) for file in files for line in file.read_text().splitlines()]
    from math_verify import parse, verify

    from megatron_antisd.grading.math import grade

    print("| answers | kind | cases | wrong here | wrong by Math-Verify |\n|---|---|---:|---:|---:|")
    for title, kinds, right in (("wrong", NEGATIVES, False), ("right", POSITIVES, True)):
        cases: dict[str, list[tuple[bool, bool]]] = {}
        for kind, text, gold in perturbed(dict.fromkeys((*GOLDS, *found)), kinds):
            response = f"So $\\boxed{{{text.strip('$')}}}$."
            verdicts = grade(response, gold) == 1.0, bool(verify(parse(f"${gold.strip('$')}$"), parse(response)))
            cases.setdefault(kind, []).append((verdicts[0] != right, verdicts[1] != right))
        cases["all"] = [case for members in cases.values() for case in members]
        for kind, members in cases.items():
            print(f"| {title} | {kind} | {len(members)} | {sum(ours for ours, _ in members)} | {sum(other for _, other in members)} |", flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=4000, help="answers for the pool (default: %(default)s)")
    parser.add_argument("--plain-answers", type=int, default=400, help="of them for Math-Verify in one process (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=GradingConfig().timeout_seconds, help="seconds an answer may take (default: %(default)s)")
    parser.add_argument("--hang-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rates", action="store_true", help="count wrong verdicts by kind instead")
    options = parser.parse_args(arguments)
    if options.rates:
        return print_rates()
    answers = mix(options.answers, random.Random(options.seed))
    tasks, right = [task for task, _ in answers], [float(correct) for _, correct in answers]
    print(f"{machine()}; {len(tasks)} answers, {options.workers} workers, time-out {options.timeout:g} s\n")
    print("| way | answers/s | seconds | processor ms an answer | time-outs | right ones refused | wrong ones accepted |\n"
          "|---|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    pool = pool_rate(tasks, options.workers, options.timeout)
    _row("pool", pool, right)
    hanging = with_hangs(tasks, options.hang_every)
    expected = sum(task is not other for task, other in zip(tasks, hanging, strict=True))
    hangs = pool_rate(hanging, options.workers, options.timeout)
    _row(f"pool, 1 in {options.hang_every} hangs", hangs)
    if hangs.timeouts < expected:
        print(f"only {hangs.timeouts} of {expected} hanging answers ran out of time: this measures something else", file=sys.stderr)
        return 1
    step = max(1, len(tasks) // options.plain_answers) | 1  # odd, so that right and wrong ones are among them
    plain = math_verify_rate(tasks[::step])
    _row("Math-Verify, one process", plain, right[::step])
    print(f"\nThe pool takes {pool.rate / plain.rate:.1f} times the answers, {hangs.rate / pool.rate:.0%} of its rate with hangs.")
    return int(pool.rate < GOAL or hangs.rate < GOAL_WITH_HANGS)


def _row(name: str, measured: Measured, right: Sequence[float] = ()) -> None:
    pairs = list(zip(measured.rewards, right, strict=True)) if right else []
    refused = f"{sum(got < want for got, want in pairs)} of {sum(want for _, want in pairs):.0f}" if pairs else "-"
    accepted = f"{sum(got > want for got, want in pairs)} of {sum(1 - want for _, want in pairs):.0f}" if pairs else "-"
    print(f"| {name} | {measured.rate:.0f} | {measured.seconds:.1f} | {1000 * measured.processor / measured.answers:.1f} "
          f"| {measured.timeouts} | {refused} | {accepted} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
