"""Checkpoints onto a disk that is full or becomes read-only: the run stops or goes on as configured, and what was whole stays whole. The disks are
small tmpfs mounts, which need root."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_world import World, configuration, launch, make_world, train, without_times, write

from megatron_antisd.metrics.journal import read_journal
from megatron_antisd.parallel.checkpoint_files import checkpoints, content_fault, read_manifest

pytest.importorskip("vllm", reason="vLLM is not installed")

STEPS = 5
ROOM_FOR_TWO = 9 << 20
"""Bytes: a checkpoint takes 3.6 MB."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def disk(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """`checkpoints/` of a run, a small disk of its own."""
    directory = world.root / request.node.name / "checkpoints"
    directory.mkdir(parents=True)
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM_FOR_TWO}", "tmpfs", str(directory)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True, capture_output=True)


def make_config(world: World, directory: Path, on_failure: str) -> Path:
    raw = configuration(world, directory, run={"steps": STEPS}, parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2},
                        checkpoint={"every": 1, "keep": 2, "save_hf": False, "on_failure": on_failure})
    return write(raw, world.root / f"{directory.name}.yaml")


def assert_whole(path: Path) -> None:
    assert content_fault(path, read_manifest(path)["sha256"]) is None


def names(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.iterdir())


@pytest.mark.slow
def test_a_full_disk_with_continue(world: World, disk: Path) -> None:
    """Two checkpoints fit and must stay until a third is whole, so no third ever fits; with more room the run goes on to the numbers of one that
    always had it."""
    config = make_config(world, disk.parent, "continue")
    output = train(2, config)
    assert "No space left on device" in output and "Older checkpoints are as they were" in output
    assert names(disk) == ["step_000001", "step_000002"]
    for path in checkpoints(disk):
        assert_whole(path)
    failed = [row["step"] for row in read_journal(disk.parent) if row["kind"] == "checkpoint_failed"]
    assert failed and set(failed) <= {3, 4, 5}
    assert [row["step"] for row in without_times(disk.parent)] == list(range(1, STEPS + 1))
    remount(disk, f"size={8 * ROOM_FOR_TWO}")
    train(2, config)
    assert names(disk) == ["step_000004", "step_000005"]
    undisturbed = world.root / "undisturbed"
    train(2, make_config(world, undisturbed, "stop"))
    assert without_times(disk.parent) == without_times(undisturbed)


def test_a_full_disk_with_stop(world: World, disk: Path) -> None:
    done = launch(2, "-m", "megatron_antisd.train", make_config(world, disk.parent, "stop"))
    assert done.returncode != 0
    assert "No space left on device" in done.stdout and "checkpoint.on_failure=continue" in done.stdout and "step_000003.tmp" in done.stdout
    assert names(disk) == ["step_000001", "step_000002"]
    for path in checkpoints(disk):
        assert_whole(path)


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(world: World, disk: Path) -> None:
    def forbid() -> None:
        while not (disk / "step_000001").is_dir():
            time.sleep(0.02)
        while True:
            try:
                return remount(disk, "ro")
            except subprocess.CalledProcessError:  # a file of the next checkpoint is open
                time.sleep(0.02)

    watcher = threading.Thread(target=forbid, daemon=True)
    watcher.start()
    output = train(2, make_config(world, disk.parent, "continue"))
    watcher.join(timeout=10)
    assert not watcher.is_alive() and "Read-only file system" in output
    assert [row["step"] for row in without_times(disk.parent)] == list(range(1, STEPS + 1))
    whole = [path for path in checkpoints(disk)]
    assert whole
    for path in whole:
        assert_whole(path)


def test_a_read_only_run_directory_is_refused(world: World, disk: Path) -> None:
    remount(disk, "ro")
    done = launch(1, "-m", "megatron_antisd.train", write(configuration(world, disk / "run"), world.root / "refused.yaml"))
    assert done.returncode != 0 and "configuration error: run.directory=" in done.stdout and "Read-only file system" in done.stdout
    assert "megatron_antisd/train.py" not in done.stdout, "a traceback of ours"
