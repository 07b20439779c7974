"""The quickstart's inputs: problems, held-out problems and the base model. Made once, kept while the files that make them stay the same.

    python -m examples.quickstart.prepare DIR [--seed N]
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.quickstart import task

TRAIN_PROBLEMS, HELD_OUT_PROBLEMS = 2000, 256
HERE = Path(__file__).parent


def recipe(seed: int) -> str:
    """A hash of everything that decides the result."""
    digest = hashlib.sha256(f"seed {seed}".encode())
    for name in ("task.py", "tokenizer.py", "make_base.py", "prepare.py"):
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def prepare(directory: Path, seed: int) -> None:
    """Write train.jsonl, search.jsonl and base/ unless they are there. `seed` is the base model's; the problems are always the same."""
    stamp = directory / "recipe.txt"
    if stamp.is_file() and stamp.read_text() == recipe(seed):
        print(f"{directory}: problems and base model are there")
        return
    directory.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    task.write_problems(directory / "train.jsonl", TRAIN_PROBLEMS, seed=0, split="train")
    task.write_problems(directory / "search.jsonl", HELD_OUT_PROBLEMS, seed=0, split="eval")
    start = time.perf_counter()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "examples.quickstart.make_base", str(directory / "base"), "--seed", str(seed)]
    subprocess.run(command, check=True)
    stamp.write_text(recipe(seed))
    seconds = time.perf_counter() - start
    print(f"{directory}: {TRAIN_PROBLEMS} problems, {HELD_OUT_PROBLEMS} held out, base model pretrained in {seconds:.0f} s")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's inputs.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the base model")
    options = parser.parse_args(arguments)
    prepare(options.directory, options.seed)


if __name__ == "__main__":
    main(sys.argv[1:])
