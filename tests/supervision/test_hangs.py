"""Real ranks under torchrun of which one is stuck, stopped, killed or fails: what the others say about it, and how all end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from started import Started, started

HERE = Path(__file__).parent
WORLD = 3
CULPRIT = 1
BARRIER = r"barrier \(supervision/supervised_ranks\.py:\d+, number \d+\)"
WAITING = r"ranks 0, 2 wait in all_reduce \(supervision/supervised_ranks\.py:\d+\)"


def run(tmp_path: Path, fault: str) -> tuple[Started, int]:
    """The ended run and the culprit's process id."""
    with started(tmp_path / "output", "--standalone", "--nproc-per-node", str(WORLD), str(HERE / "supervised_ranks.py"),
                 str(tmp_path), fault, str(CULPRIT)) as run:
        pid = run.pids(WORLD)[CULPRIT]
        if fault == "stop":  # torchrun's SIGTERM reaches it only now; its SIGKILL would come after 30 s
            run.wait_for(r"(gives no sign of life)")
            os.kill(pid, signal.SIGCONT)
        run.exit_code()
        return run, pid


def reports(output: str) -> list[str]:
    return re.findall(r"ERROR (stage generate of step 2: .*)", output)


def check_stacks(run: Started, directory: Path, living: tuple[int, ...]) -> None:
    """Of every living rank, on stderr and in its file: its place, and the line where it is."""
    for rank in living:
        text = (directory / "hangs" / f"rank_{rank:05d}.txt").read_text()
        assert f"rank {rank}, host " in text and "stage generate of step 2" in text
        assert re.search(r"supervised_ranks\.py", text)
        assert re.search(rf"^\[rank {rank}\]   File .*supervised_ranks\.py", run.output, re.MULTILINE)


def exit_codes(output: str) -> dict[int, int]:
    return {int(rank): int(code) for rank, code in re.findall(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: (-?\d+)", output)}


@pytest.mark.parametrize("fault", ["sleep", pytest.param("spin", marks=pytest.mark.slow)])
def test_a_stuck_rank_is_named_when_the_stage_is_over_its_time(tmp_path: Path, fault: str) -> None:
    run_, pid = run(tmp_path, fault)
    found = reports(run_.output)
    assert found
    for text in found:
        assert re.match(r"stage generate of step 2: rank \d: time-out after 5 s\. ", text)
        seconds = re.search(rf"rank 1 \(host \S+, pid {pid}\) is stuck in stage generate of step 2 since (\d+) s; its last collective "
                            rf"{BARRIER}: ended \d+ s before; {WAITING}", text)
        assert seconds, text
        assert 4 <= int(seconds.group(1)) <= 10  # the time-out is 5 s, then come at most a few heartbeats of 0.5 s
    check_stacks(run_, tmp_path, (0, 1, 2))
    assert f"in {fault}" in (tmp_path / "hangs/rank_00001.txt").read_text()
    codes = set(exit_codes(run_.output).values())
    assert 76 in codes and codes <= {1, 76}  # another rank's collective may break by the first one's end before its own watchdog looks again


@pytest.mark.slow
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    run_, pid = run(tmp_path, "stop")
    assert re.search(rf"rank 0: rank 1 gave no sign of life for 3 s\. rank 1 \(host \S+, pid {pid}\) gives no sign of life.*; last seen "
                     rf"in stage generate of step 2, .*; its last collective {BARRIER}.*; {WAITING}", "\n".join(reports(run_.output)))
    check_stacks(run_, tmp_path, (0, 2))
    assert exit_codes(run_.output)[0] == exit_codes(run_.output)[2] == 76


@pytest.mark.slow
def test_a_killed_rank_is_named_by_those_whose_collective_breaks(tmp_path: Path) -> None:
    run_, pid = run(tmp_path, "die")
    assert re.search(rf"rank 1 \(host \S+, pid {pid}\) is dead, its process is gone; last seen in stage generate of step 2, \d s after its begin; "
                     rf"its last collective {BARRIER}", "\n".join(reports(run_.output)))
    check_stacks(run_, tmp_path, (0, 2))
    codes = exit_codes(run_.output)
    assert codes[1] == -signal.SIGKILL
    assert {codes[0], codes[2]} <= {1, 76}  # by the collective's exception, or by the watchdog where that was quicker


@pytest.mark.slow
def test_a_rank_whose_interpreter_is_held_by_c_code_is_named_and_shows_its_stack(tmp_path: Path) -> None:
    run_, pid = run(tmp_path, "hold_interpreter")
    assert re.search(rf"rank 1 \(host \S+, pid {pid}\) (gives no sign of life|is dead).*last seen in stage generate of step 2, .*; its last "
                     rf"collective {BARRIER}", "\n".join(reports(run_.output)))
    check_stacks(run_, tmp_path, (0, 2))
    assert re.search(r"Timeout \(0:00:04\)!(.*\n)+?.*in hold_interpreter", run_.output)  # silence of 3 s and two heartbeats
    assert exit_codes(run_.output)[1] == 1


@pytest.mark.slow
def test_a_rank_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    run_, pid = run(tmp_path, "fail")
    found = reports(run_.output)
    assert found
    for text in found:
        assert re.search(rf"rank 1 \(host \S+, pid {pid}\) failed in stage generate of step 2 by ValueError: the dog ate the batch; "
                         rf"its last collective {BARRIER}: ended 0 s before", text)
    assert run_.output.count("ValueError: the dog ate the batch\n") >= 2  # as a traceback of its own too
    check_stacks(run_, tmp_path, (0, 1, 2))
    codes = exit_codes(run_.output)
    assert codes[1] == 1 and codes[0] == codes[2] == 76


@pytest.mark.slow
def test_a_rank_that_leaves_alone_is_named(tmp_path: Path) -> None:
    run_, pid = run(tmp_path, "leave")
    assert re.search(rf"rank 1 \(host \S+, pid {pid}\) ended in .* by SystemExit: nothing to do", "\n".join(reports(run_.output)))


@pytest.mark.slow
def test_a_wall_clock_that_jumps_does_not_matter(tmp_path: Path) -> None:
    run_, _ = run(tmp_path, "jump")
    assert run_.process.returncode == 0, run_.output
    assert not (tmp_path / "hangs").exists()
    assert all(f"rank {rank} is done" in run_.output for rank in range(WORLD))


@pytest.mark.slow
def test_a_rank_that_takes_the_store_with_it_is_named_by_its_watcher(tmp_path: Path) -> None:
    """Without torchrun the store lives in rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen([sys.executable, str(HERE / "supervised_ranks.py"), str(tmp_path), "die", "0"], env=environment,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    output = processes[1].communicate(timeout=90)[0]
    processes[0].communicate(timeout=90)
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 1]
    report = next(line for line in output.splitlines() if line.startswith("ERROR stage generate of step 2"))
    assert "The store does not answer" in report
    assert re.search(rf"rank 0 \(host \S+, pid {processes[0].pid}\) is dead, its process is gone; last seen in stage generate of step 2", report)
