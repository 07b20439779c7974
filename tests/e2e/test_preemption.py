"""A run that a scheduler asks to stop saves, leaves, and goes on with the same command as if nothing had happened."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from calm import PATIENCE, STEPS, assert_same_run, make_config, wait_until
from started import LAUNCH, TORCHRUN, Started, started
from tiny_world import World, rows_of, train, without_times

from megatron_antisd.metrics.journal import read_journal

pytest.importorskip("vllm", reason="vLLM is not installed")

RARELY = 100
"""Steps between checkpoints: none is due before the last step."""


def steps_done(directory: Path) -> int:
    file = directory / "metrics.jsonl"
    return sum(line.endswith("}") and "reward_mean" in line for line in file.read_text().splitlines()) if file.is_file() else 0


def rank_process(run: Started, rank: int) -> psutil.Process:
    """The ranks are torchrun's own children, each in a session of its own."""
    return next(child for child in psutil.Process(run.process.pid).children() if child.environ().get("RANK") == str(rank))


def preempted(directory: Path, config: Path, module: str, ask: Callable[[Started], None], when: Callable[[], bool], seed: int) -> Started:
    """Start, wait, ask at a moment of dice's choice, and wait for the end; started again by nobody, though it might be."""
    arguments = ("--standalone", "--max-restarts", "3", "--nproc-per-node", "2", "-m", "megatron_antisd.train", str(config))
    with started(directory.with_suffix(".output"), *arguments, module=module) as run:
        wait_until(run, when)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        ask(run)
        run.process.wait(PATIENCE)
    assert run.process.returncode == (75 if module == LAUNCH else 1), run.output[-6000:]
    assert "failed in stage" not in run.output, run.output[-6000:]
    return run


def check_saved(directory: Path) -> int:
    """The step that it left after: the last one whose row there is, saved although no checkpoint was due."""
    left = json.loads((directory / "preempted.json").read_text())
    step = left["step"]
    assert [row["step"] for row in rows_of(directory)] == list(range(1, step + 1)) and step < STEPS
    assert left["checkpoint"] == str(directory / "checkpoints" / f"step_{step:06d}") and Path(left["checkpoint"]).is_dir()
    assert [(row["kind"], row["step"]) for row in read_journal(directory)] == [("preempted", step)]
    assert not (directory / "hf").exists()
    return step


def check_goes_on(directory: Path, config: Path, undisturbed: Path, step: int) -> None:
    train(2, config, timeout=PATIENCE)
    assert [(row["kind"], row["step"]) for row in read_journal(directory)] == [("preempted", step), ("resumed", step)]
    assert not (directory / "preempted.json").exists()
    assert_same_run(directory, undisturbed)


def terminate(run: Started) -> None:
    run.process.send_signal(signal.SIGTERM)


def signal_to_one_rank(run: Started) -> None:
    rank_process(run, 1).send_signal(signal.SIGUSR1)


CASES = {
    "launcher": (LAUNCH, terminate),
    "torchrun": pytest.param(TORCHRUN, terminate, marks=pytest.mark.slow),
    "one-rank": pytest.param(TORCHRUN, signal_to_one_rank, marks=pytest.mark.slow),
    "one-rank-of-the-launcher": pytest.param(LAUNCH, signal_to_one_rank, marks=pytest.mark.slow),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("module", "ask"), list(CASES.values()), ids=list(CASES))
def test_asked_to_stop_in_a_step(world: World, calm: Path, request: pytest.FixtureRequest, module: str, ask: Callable[[Started], None]) -> None:
    name = request.node.callspec.id
    directory = world.root / f"stopped-{name}"
    config = make_config(world, directory, checkpoint={"every": RARELY})
    preempted(directory, config, module, ask, lambda: steps_done(directory) >= 1, seed=list(CASES).index(name))
    check_goes_on(directory, config, calm, check_saved(directory))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asked_to_stop_in_an_evaluation(world: World, calm: Path) -> None:
    """It is not made to its end first; the next start goes on with its next part."""
    directory = world.root / "stopped-evaluation"
    config = make_config(world, directory, checkpoint={"every": RARELY})
    samples, go_on = directory / "evaluations/step_000003/tiny.jsonl", directory.with_suffix(".go_on")
    script = str(Path(__file__).with_name("held_evaluation.py"))
    with started(directory.with_suffix(".output"), "--standalone", "--nproc-per-node", "2", script, str(config), "3", str(go_on),
                 module=LAUNCH) as run:
        wait_until(run, lambda: samples.is_file() and samples.read_bytes().count(b"\n") == 5)  # the header, and a part of four
        rank_process(run, 1).send_signal(signal.SIGTERM)
        time.sleep(0.2)
        go_on.touch()
        assert run.process.wait(PATIENCE) == 75, run.output[-6000:]
    kept = samples.read_bytes()
    assert kept.count(b"\n") in (5, 9), "no more than the part that rank 1 had begun"
    assert check_saved(directory) == 3
    assert without_times(directory) == without_times(calm)[: len(without_times(directory))]
    assert not any(row["step"] == 3 and "eval/tiny/avg@2" in row for row in without_times(directory))
    check_goes_on(directory, config, calm, 3)
    assert samples.read_bytes().startswith(kept)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_asked_to_stop_before_the_first_step(world: World, calm: Path) -> None:
    """There is nothing to save: the same command starts from the beginning."""
    directory = world.root / "stopped-early"
    config = make_config(world, directory, checkpoint={"every": RARELY})
    preempted(directory, config, LAUNCH, terminate, lambda: (directory / "evaluations/step_000000").is_dir(), seed=0)
    left = json.loads((directory / "preempted.json").read_text())
    if left["step"] == 0:
        assert left["checkpoint"] is None
    train(2, config, timeout=PATIENCE)
    assert_same_run(directory, calm)
