"""How long a step waits for grading, against its generation: `python -m benchmarks.grading_overlap [--rounds 2] [--formulas]`.

The quickstart's own run (its base model, so responses end at different times) for some steps on two processes. Side by side: grading that
starts with the first response that is done, and grading after the last one. The goal: the step waits less than 5 % of the time that
generation takes. With `--formulas` each answer is a formula of its own that Math-Verify has to parse, some 10 ms instead of 0.1: on two
cores, which the engine fills, such work can be moved but not hidden.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.launch import ROOT, machine, median, read_metrics, run

GOAL = 0.05
WAYS = ("early", "late")
WARM_UP, STEPS = 3, 15


def grade_as_formula(response: str, answer: str) -> float:
    """Parses a formula that is another one for each response; right for half of them."""
    from megatron_antisd.grading.math import grade

    number = zlib.crc32(f"{answer} {response}".encode())
    gold = f"\\frac{{{number % 997}x}}{{{number % 89 + 2}}} + \\sqrt{{{number % 13 + 2}}}"
    return grade(f"\\boxed{{{gold if number & 1 else gold + ' + 1'}}}", gold)


def measure(directory: Path, rounds: int, formulas: bool) -> dict[str, list[dict[str, Any]]]:
    """The steps that count of each way, over all rounds, by turns."""
    run([sys.executable, "-m", "examples.quickstart.prepare", "runs/quickstart-inputs"], threads=2)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            overrides = [f"run.steps={WARM_UP + STEPS}", f"run.directory={directory / f'{way}{number}'}", "evaluation.benchmarks=[]",
                         "checkpoint.every=null", "checkpoint.save_hf=false", "logging.progress=false", "logging.tensorboard=false"]
            overrides += ["grading.function=benchmarks.grading_overlap:grade_as_formula"] if formulas else []
            run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benchmarks.grading_overlap",
                 "--rank", way, str(ROOT / "examples/quickstart/config.yaml"), *overrides], threads=1)
            rows[way] += read_metrics(directory / f"{way}{number}")[WARM_UP:]
    return rows


def train_rank(way: str, arguments: Sequence[str]) -> None:
    """One rank of a run. `late`: no answer is given to a grader before the engine is done."""
    from megatron_antisd.grading.pool import OpenGrading
    from megatron_antisd.train import main as train

    if way == "late":
        OpenGrading.poll = lambda self: None
    train(arguments)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--rank"]:
        train_rank(arguments[1], arguments[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--formulas", action="store_true", help="answers that are costly to grade")
    options = parser.parse_args(arguments)
    print(machine())
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), options.rounds, options.formulas)
    shares = {}
    print("| grading | seconds of generation | seconds the step waited | share | seconds of a step |\n|---|---:|---:|---:|---:|")
    for way in WAYS:
        generate, grade, total = (median(rows[way], f"seconds_{stage}") for stage in ("generate", "grade", "total"))
        shares[way] = grade / generate
        print(f"| {way} | {generate:.3f} | {grade:.4f} | {shares[way]:.1%} | {total:.3f} |")
    met = shares["early"] <= GOAL
    print(f"goal: at most {GOAL:.0%}, {'met' if met else 'MISSED'}")
    return int(not met and not options.formulas)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
