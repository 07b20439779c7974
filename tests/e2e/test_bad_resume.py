"""Starting again where something is not as it was left: refused with a word of what to do, or made up for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from calm import PATIENCE, STEPS, assert_same_run, files_below, make_config, wait_until
from started import started
from tiny_world import World, launch, make_world, rows_of, train, without_times

from megatron_antisd.metrics.journal import read_journal

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ONE_RANK = ("parallel.tensor_parallel_size=1", "parallel.expert_parallel_size=1", "rollout.engine=megatron")
"""A cheap start, on a layout that a run may change to."""


@pytest.fixture
def copied(world: World, calm: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The undisturbed run once more, for itself: its directory and its configuration. It is over, and a start has nothing to train."""
    directory = world.root / request.node.name
    shutil.copytree(calm, directory)
    return directory, make_config(world, directory)


def damage(directory: Path, step: int) -> None:
    """One bit of one byte, which sizes do not show."""
    file = next((directory / f"checkpoints/step_{step:06d}/tensors").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def kept(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(directory).items() if name != "lock"}


def refused(directory: Path, config: Path, *overrides: str) -> str:
    """What a start says that changes nothing in the directory."""
    before = kept(directory)
    done = launch(1, "-m", "megatron_antisd.train", config, *ONE_RANK, *overrides, timeout=PATIENCE)
    assert done.returncode != 0
    assert "configuration error: " in done.stdout and 'train.py", line' not in done.stdout, f"a message, not a traceback:\n{done.stdout[-6000:]}"
    assert kept(directory) == before
    return done.stdout


def test_a_changed_configuration(copied: tuple[Path, Path]) -> None:
    output = refused(*copied, "optimizer.lr=5e-4", "rollout.temperature=0.5", "gate.warmup_steps=2")
    for line in ("the configuration changes what step_000006 was trained with", "optimizer.lr: 0.001 -> 0.0005", "rollout.temperature: 1.0 -> 0.5",
                 "gate.warmup_steps: 1 -> 2", "gate.warmup_steps cannot change within a run",
                 "take them back, or accept with checkpoint.accept_changes=[", "free to change are run.name"):
        assert line in output, output[-4000:]


def test_a_model_of_another_family(world: World, copied: tuple[Path, Path]) -> None:
    dense = make_world(world.root / "dense", moe=False)
    output = refused(*copied, f"model.path={dense.checkpoint}")
    assert "step_000006 is a checkpoint of another model than model.path describes" in output
    assert "experts" in output


def test_no_checkpoint_is_whole(copied: tuple[Path, Path]) -> None:
    for step in (STEPS - 1, STEPS):
        damage(copied[0], step)
    output = refused(*copied)
    assert "none of the 2 checkpoints in" in output and "checkpoint.resume=false" in output
    assert output.count(".distcp") >= 2, "the damaged files are named"


def test_the_newest_checkpoint_is_damaged_and_the_last_line_cut_off(copied: tuple[Path, Path], calm: Path) -> None:
    """The run goes on from the one before, and makes up for what it lost."""
    directory, config = copied
    damage(directory, STEPS)
    shutil.rmtree(directory / "hf")
    metrics = directory / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    output = train(2, config, timeout=PATIENCE)
    assert re.search(r"step_000006 is damaged: .*\.distcp", output) and "falling back to" in output
    assert "cut off after" in output
    assert [(row["kind"], row["step"]) for row in read_journal(directory)] == [("resumed", STEPS - 1)]
    assert_same_run(directory, calm)


def test_rows_that_were_lost_are_told(copied: tuple[Path, Path]) -> None:
    directory, config = copied
    metrics = directory / "metrics.jsonl"
    lines = [line for line in metrics.read_bytes().splitlines(keepends=True) if json.loads(line)["step"] != 2]
    metrics.write_bytes(b"".join(lines))
    with (directory / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"time": "2026-01-01T00:00:00+00:00", "ste')  # a crash cut it off
    train(1, config, *ONE_RANK, timeout=PATIENCE)
    rows = read_journal(directory)
    assert [(row["kind"], row["step"]) for row in rows] == [("metrics_lost", STEPS), ("resumed", STEPS)]
    assert "lacks the rows of 1 finished steps, the first of step 2" in rows[0]["message"]
    assert metrics.read_bytes() == b"".join(lines)


def test_two_runs_in_one_directory(world: World, calm: Path) -> None:
    """The second is told by whom the directory is taken; the first does not notice."""
    directory = world.root / "taken"
    config = make_config(world, directory, parallel={"timeout_seconds": PATIENCE})
    go_on, script = directory.with_suffix(".go_on"), str(Path(__file__).with_name("held_evaluation.py"))
    with started(directory.with_suffix(".output"), "--standalone", "--nproc-per-node", "2", script, str(config), "0", str(go_on)) as first:
        wait_until(first, lambda: (directory / "evaluations/step_000000/tiny.jsonl").is_file())
        output = launch(1, "-m", "megatron_antisd.train", config, *ONE_RANK, timeout=PATIENCE).stdout
        holder = json.loads((directory / "lock").read_text())["pid"]
        assert f"is in use by another run (process {holder} on " in output and "give another run.name" in output
        assert first.process.poll() is None, first.output[-6000:]
        go_on.touch()
        assert first.process.wait(PATIENCE) == 0, first.output[-6000:]
    assert_same_run(directory, calm)


def test_a_clock_that_jumps(world: World, calm: Path) -> None:
    directory = world.root / "jumping"
    done = launch(2, Path(__file__).with_name("jumping_clock.py"), make_config(world, directory), timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-6000:]
    assert without_times(directory) == without_times(calm)
    for row in rows_of(directory):
        seconds = {key: value for key, value in row.items() if key.startswith("seconds")}
        assert all(0 <= value < PATIENCE for value in seconds.values() if value is not None), seconds
    assert_same_run(directory, calm)
