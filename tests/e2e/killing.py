"""Training that is killed again and again: `killing.py PLAN.json CONFIG.yaml [key=value ...]`, started by torchrun with restarts.

The k-th life of the ranks belongs to the k-th kill of the plan: one rank gets SIGKILL at a place of the program, at once or from a timer. Each
kill is written to `PLAN.kills.jsonl` just before it comes. A life behind the plan's end is left alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

STAGES = ("setup", "generate", "grade", "teacher", "step", "sync", "figures", "save", "evaluate")
"""Stages under supervision: the kill comes in one that has begun."""
EVERY_RANK = (*STAGES, "between", "background", "export")
"""`between`: a stage has just ended. `background`: in the thread that writes a checkpoint. `export`: in the middle of it, after the last step."""
MAIN_RANK = ("config", "cut_back", "row", "manifest", "commit", "removal")
"""What only the main rank does. `config`: it writes config.yaml. `cut_back`: files of a resumed run are to be cut back. `row`: a step's row is
written, its checkpoint is not. `manifest`: all but a checkpoint's manifest is written. `commit`: the manifest as well, it does not bear its name
yet. `removal`: a superseded one lost its name and is to be deleted."""
ALL = 2 * len(EVERY_RANK) + len(MAIN_RANK)
LATE = ("cut_back", "export")
"""Places that only a run with a checkpoint comes to, or one whose steps are done."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    rank: int
    place: str
    occurrence: int = 1
    """1 for the first time that this life of the rank comes there."""
    delay: float = 0.0
    """Seconds; 0 is at once, in the thread that came there."""


def make_plan(seed: int) -> list[Kill]:
    """ALL kills: every place on every rank that comes there, in an order, at occurrences and with delays of dice."""
    dice = random.Random(seed)
    places = [(rank, place) for place in EVERY_RANK for rank in (0, 1)] + [(0, place) for place in MAIN_RANK]
    dice.shuffle(places)
    places.sort(key=lambda entry: LATE.index(entry[1]) if entry[1] in LATE else -1)
    return [_roll(dice, rank, place) for rank, place in places]


def _roll(dice: random.Random, rank: int, place: str) -> Kill:
    if place in ("config", *LATE):
        return Kill(rank=rank, place=place)
    longest = 3.0 if place == "setup" else 0.3
    return Kill(rank=rank, place=place, occurrence=dice.randint(1, 12 if place == "between" else 2),
                delay=dice.choice((0.0, round(dice.uniform(0, longest), 3))))


def most_steps(plan: list[Kill], *, evaluated_every: int, kept: int) -> int:
    """No more steps are done when the last kill before LATE ones is due: a run of fewer might be over before."""
    per_occurrence = {"evaluate": evaluated_every, "between": 1 / 5}
    return sum(math.ceil(kill.occurrence * per_occurrence.get(kill.place, 1)) + (kept if kill.place == "removal" else 0) + (kill.delay > 0)
               for kill in plan if kill.place not in LATE)


def write_plan(file: Path, directory: Path, plan: list[Kill]) -> Path:
    """`directory`: the run's."""
    file.write_text(json.dumps({"directory": str(directory), "kills": [dataclasses.asdict(kill) for kill in plan]}))
    return file


def kills_file(plan_file: Path) -> Path:
    return plan_file.with_suffix(".kills.jsonl")


class Killer:
    """Waits at the place of one kill, on the rank that it is for."""

    def __init__(self, kill: Kill, life: int, file: Path, directory: Path) -> None:
        self._kill, self._life, self._file, self._directory = kill, life, file, directory
        self._left = kill.occurrence
        self._stage = "before"  # that the main thread is in

    def come_to(self, place: str) -> None:
        if place in STAGES:
            self._stage = place
        if place != self._kill.place:
            return
        self._left -= 1
        if self._left == 0 and self._kill.delay:
            timer = threading.Timer(self._kill.delay, self._die)
            timer.daemon = True
            timer.start()
        elif self._left == 0:
            self._die()

    def _die(self) -> None:
        saved = [int(path.name.removeprefix("step_")) for path in self._directory.glob("checkpoints/step_*") if not path.suffix]
        row = {"life": self._life, **dataclasses.asdict(self._kill), "stage": self._stage, "saved": max(saved, default=0)}
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str, place: str, due: Callable[..., bool] = lambda *_: True) -> None:
        """Where a function is called with arguments that are `due`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if due(*arguments):
                self.come_to(place)
            return function(*arguments, **options)

        setattr(owner, name, wrapped)

    def after(self, owner: Any, name: str, place: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            self.come_to(place)
            return result

        setattr(owner, name, wrapped)


def lie_in_wait(killer: Killer) -> None:
    """At every place of a run."""
    from megatron_antisd import train
    from megatron_antisd.metrics.writer import MetricsWriter
    from megatron_antisd.supervision.supervisor import BETWEEN, Supervisor

    enter, restore = Supervisor._enter, train.restore

    def enter_and_look(self: Supervisor, stage: Any) -> Any:
        entered = enter(self, stage)
        killer.come_to("between" if stage.name == BETWEEN else stage.name)
        return entered

    def restore_and_wait(run: Any) -> Any:  # Megatron is imported now, as it must be
        _lie_in_wait_at_checkpoints(killer, is_main=run.is_main)
        return restore(run)

    Supervisor._enter, train.restore = enter_and_look, restore_and_wait
    killer.before(train, "write_config", "config")
    killer.before(MetricsWriter, "_cut_back", "cut_back")
    killer.after(MetricsWriter, "log", "row")


def _lie_in_wait_at_checkpoints(killer: Killer, *, is_main: bool) -> None:
    from megatron_antisd.checkpoint import writer
    from megatron_antisd.parallel import reshard
    from megatron_antisd.run import Run

    killer.before(writer.CheckpointWriter, "_save_tensors", "background")
    killer.before(writer, "write_manifest", "manifest")
    killer.after(writer, "write_manifest", "commit")
    killer.before(shutil, "rmtree", "removal", due=lambda path, *_: ".deleted" in str(path))
    if is_main:
        killer.after(reshard, "_write_shard", "export")
    else:
        killer.before(Run, "save_huggingface", "export")


def main() -> None:
    from megatron_antisd.train import main as train

    plan_file, *arguments = sys.argv[1:]
    given = json.loads(Path(plan_file).read_text())
    plan, life = [Kill(**row) for row in given["kills"]], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if life < len(plan) and plan[life].rank == int(os.environ["RANK"]):
        lie_in_wait(Killer(plan[life], life, kills_file(Path(plan_file)), Path(given["directory"])))
    train(arguments)


if __name__ == "__main__":
    main()
