"""Signals, the agreement of all ranks, and the exit codes under torchrun and under the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from started import LAUNCH, TORCHRUN, Started, started

from megatron_antisd.launch.__main__ import with_defaults
from megatron_antisd.supervision import preemption

HERE = Path(__file__).parent
WORLD = 2


def check_clean_stop(run: Started, directory: Path) -> None:
    """All ranks stopped after the same step, were not started again, and left word of it."""
    stops = dict(re.findall(r"rank (\d) stops after step (\d+)", run.output))
    assert len(stops) == WORLD and len(set(stops.values())) == 1, run.output
    saved = json.loads((directory / "preempted.json").read_text())
    assert saved["step"] == int(stops["0"]) and saved["checkpoint"] == str(directory / "checkpoint")
    for rank in range(WORLD):
        assert (directory / f"starts_{rank}").read_text() == "start\n"


def start(tmp_path: Path, module: str) -> contextlib.AbstractContextManager[Started]:
    return started(tmp_path / "output", "--standalone", "--max-restarts", "3", "--nproc-per-node", str(WORLD), str(HERE / "stopping_ranks.py"),
                   str(tmp_path), module=module)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_ranks_and_ends_with_75(tmp_path: Path) -> None:
    with start(tmp_path, LAUNCH) as run:
        run.pids(WORLD)
        run.process.send_signal(signal.SIGUSR1)  # of which torchrun alone dies
        assert run.exit_code() == 75, run.output
    check_clean_stop(run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_kind_of_signal_to_the_launcher(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, LAUNCH) as run:
        run.pids(WORLD)
        run.process.send_signal(number)
        code = run.exit_code()
    if number == signal.SIGTERM:
        assert code == 75
        check_clean_stop(run, tmp_path)
    else:  # Ctrl-C is no preemption
        assert code == 1
        assert not (tmp_path / "preempted.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("module", "code"), [(TORCHRUN, 1), (LAUNCH, 75)])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, module: str, code: int) -> None:
    (tmp_path / "preempted.json").write_text("{}")  # of the process before: taken away at the start
    with start(tmp_path, module) as run:
        os.kill(run.pids(WORLD)[1], signal.SIGTERM)
        assert run.exit_code() == code, run.output
    check_clean_stop(run, tmp_path)
    assert re.search(r"rank 1 stops after step \d+, itself asked: True", run.output)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [(("--no-python", "bash", "-c", "exit 3"), 1), (("--no-python", "true"), 0),
                                                 (("--no-such-option",), 2)])
def test_the_launcher_passes_other_exit_codes_through(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    with started(tmp_path / "output", "--standalone", *arguments, module=LAUNCH) as run:
        assert run.exit_code() == code, run.output


def test_the_launchers_defaults_lie_under_what_the_user_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert with_defaults(["train.py"]) == ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=120", "train.py"]
    assert with_defaults(["--shutdown-timeout=9"])[-1] == "--shutdown-timeout=9"
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "7")
    assert with_defaults([]) == ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]


@pytest.fixture
def installed() -> Iterator[None]:
    preemption.install()
    yield
    preemption.uninstall()


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_sets_the_flag_and_does_not_kill(installed: None, number: signal.Signals) -> None:
    assert not preemption.requested() and not preemption.agreed()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert preemption.requested() and preemption.agreed()


def test_handlers_from_before_come_back() -> None:
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    preemption.install()
    preemption.install()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] != before
    preemption.uninstall()
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before


def test_a_forked_child_dies_of_sigterm_as_ever(installed: None) -> None:
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not preemption.requested()


def test_leaving_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(SystemExit) as left:
        preemption.leave_preempted(tmp_path, 7, None)
    preemption.uninstall()  # the signals are ignored until the process's end
    assert left.value.code == 75
    assert json.loads((tmp_path / "preempted.json").read_text())["checkpoint"] is None
    preemption.clear_preempted(tmp_path)
    preemption.clear_preempted(tmp_path)
    assert not list(tmp_path.iterdir())
