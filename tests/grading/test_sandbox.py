"""Hostile programs in every sandbox that this machine has: each scores 0 and harms nothing."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from grading.hostile import PROGRAMS, SCRIPTS

from megatron_antisd.config import GradingConfig
from megatron_antisd.grading import GradingPool, GradingTask
from megatron_antisd.grading.code import grade_code, run_program
from megatron_antisd.grading.encoding import Opaque
from megatron_antisd.grading.sandbox import Sandbox, SandboxEndedError, SandboxError, SandboxSettings
from megatron_antisd.grading.sandbox_choice import MODES, PROTECTIONS, Probe, choose_sandbox, closed_to, decide, probe
from megatron_antisd.records import CodeTests

ANSWERS = {3: 918_273_645, 4: 192_837_465}
"""What `solve` must give: nothing that a program could guess, and canaries if they turn up anywhere in what it returns."""
TESTS = CodeTests(entry_point="solve", cases=tuple((f"({given},)", str(wanted)) for given, wanted in ANSWERS.items()))
GOOD = f"```python\ndef solve(x):\n    return {ANSWERS}[x]\n```"
SCRIPT_TESTS = CodeTests(entry_point=None, cases=tuple((f"{given}\n", f"{wanted}\n") for given, wanted in ANSWERS.items()))
GOOD_SCRIPT = f"```python\nprint({ANSWERS}[int(input())])\n```"
LIMITS = {"seconds": 1.5, "case_seconds": 0.5, "memory_bytes": 256 << 20}


def available(mode: str) -> bool:
    if mode == "bubblewrap" and shutil.which("bwrap") is None and os.geteuid() == 0 and shutil.which("apt-get") is not None:
        subprocess.run(["apt-get", "install", "-y", "-q", "bubblewrap"], capture_output=True, timeout=60, check=False)
    found = probe(mode)
    if not found.works:
        pytest.skip(f"no sandbox {mode!r} here: {found.reason}")
    return True


ISOLATING = ("builtin", "bubblewrap")
"""Hostile programs run in these alone, and only where the probe found no hole: elsewhere they would do what they try."""


def protects(mode: str) -> bool:
    return probe(mode).works and not probe(mode).missing


@dataclass(frozen=True)
class Host:
    """What a program could harm or reach."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket

    def fill_in(self, source: str) -> str:
        places = {"FOLDER": str(self.folder), "PORT": str(self.tcp.getsockname()[1]), "SOCKET": self.unix.getsockname(), "PID": str(os.getpid())}
        return re.sub(r"\b(FOLDER|PORT|SOCKET|PID)\b", lambda match: places[match[0]], source)

    def check(self) -> None:
        canary = self.folder / "canary"
        assert sorted(path.name for path in self.folder.iterdir()) == ["canary"]
        assert canary.read_text() == "alive" and canary.stat().st_mode & 0o777 == 0o666 and canary.stat().st_nlink == 1
        for listening in (self.tcp, self.unix, self.abstract, self.udp):
            with pytest.raises(BlockingIOError):
                listening.recv(1) if listening is self.udp else listening.accept()
        assert not [path for path in ("/new", "/usr/new", "/usr/bin/new", "/dev/shm/new") if os.path.exists(path)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    for path in [folder, *folder.parents][:3]:
        path.chmod(path.stat().st_mode | 0o055)  # the sandbox alone must keep strangers out, not pytest's modes
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "open" / "canary").write_text("alive")
    (folder / "open" / "canary").chmod(0o666)
    unix, abstract, udp = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.create_server(("127.0.0.1", 0))
    unix.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    abstract.bind(f"\0antisd-canary-{os.getpid()}")
    udp.bind(tcp.getsockname())
    for one in (unix, abstract):
        one.listen()
    for one in (tcp, udp, unix, abstract):
        one.setblocking(False)
    yield Host(folder / "open", tcp, udp, unix, abstract)
    for one in (tcp, udp, unix, abstract):
        one.close()


def new_pool(mode: str) -> GradingPool:
    return GradingPool(workers=2, timeout_seconds=5.0, sandbox=SandboxSettings(mode=mode, **LIMITS))


@pytest.fixture(scope="module")
def pools() -> Iterator[Callable[[str], GradingPool]]:
    made: dict[str, GradingPool] = {}
    yield lambda mode: made.setdefault(mode, new_pool(mode))
    for pool in made.values():
        pool.close()


def sandboxed_processes(parents: set[int]) -> list[int]:
    """Of any user: those whose command line is that of a sandbox of one of these processes; zombies have none."""
    marks = {f"of-{parent}".encode() for parent in parents}
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marks & set(path.read_bytes().split(b"\0")):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def assert_nothing_left(parents: set[int]) -> None:
    deadline = time.monotonic() + 5
    while (left := sandboxed_processes(parents)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left


HOSTILE = [(name, source, TESTS, GOOD) for name, source in PROGRAMS.items()]
HOSTILE += [(f"script {name}", source, SCRIPT_TESTS, GOOD_SCRIPT) for name, source in SCRIPTS.items()]
IDS = [name for name, *_ in HOSTILE]


LONG = {"thread_bomb", "memory_bomb_swallowed", "mapping_bomb", "memory_files", "endless_errors", "endless_frames", "endless_iterator",
        "deep_recursion", "inodes_full", "sleep", "loop_while_loading", "swallowed_timeout", "blocked_signals", "catastrophic_pattern",
        "finalizer_hangs", "fork_bomb",
        "script silent_loop", "script fork_bomb", "script disk_full", "script closed_output"}  # fmt: skip
"""Those that use up their time, but for some of each kind; the slow test below runs them all in every mode."""


@pytest.mark.parametrize("number", [pytest.param(number, id=name, marks=[pytest.mark.slow] * (name in LONG)) for number, name in enumerate(IDS)])
def test_a_hostile_program_scores_0_and_harms_nothing(number: int, host: Host, pools: Callable[[str], GradingPool]) -> None:
    """Each program in one mode, the modes by turns."""
    modes = [mode for mode in ISOLATING if protects(mode)]
    if not modes:
        pytest.skip(f"no namespaces here: {probe('builtin').reason}")
    _, source, tests, good = HOSTILE[number]
    grade_and_look_around(f"```python\n{host.fill_in(source)}\n```", tests, good, host, pools(modes[number % len(modes)]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ISOLATING)
def test_all_hostile_programs_in_every_mode(mode: str, host: Host, pools: Callable[[str], GradingPool]) -> None:
    assert available(mode) and protects(mode)
    for _, source, tests, good in HOSTILE:
        grade_and_look_around(f"```python\n{host.fill_in(source)}\n```", tests, good, host, pools(mode))


def test_the_suite_is_as_large_as_promised() -> None:
    assert len(HOSTILE) >= 40 and len({source for _, source, _, _ in HOSTILE}) == len(HOSTILE)


def grade_and_look_around(response: str, tests: CodeTests, good: str, host: Host, pool: GradingPool) -> None:
    report = pool.grade_many([GradingTask(response=text, answer="", tests=tests) for text in (response, good)])
    assert report.rewards == (0.0, 1.0), response[:300]
    assert (report.timeouts, report.crashes) == (0, 0)  # the sandbox ended it, the worker lived
    host.check()
    assert_nothing_left({worker.process.pid for worker in pool._workers})


@pytest.mark.parametrize("mode", ISOLATING)
def test_what_a_program_can_see(mode: str, host: Host) -> None:
    """Values that cheats return never hold what was expected, nor anything of the host."""
    assert available(mode)
    settings = SandboxSettings(mode=mode, **{**LIMITS, "case_seconds": 2.0})
    for name in ("frames_of_the_grader", "read_the_tests", "others_memory", "environment"):
        (outcome,) = run_program(host.fill_in(PROGRAMS[name]), [(3,)], settings, entry_point="solve")
        assert outcome.error is None or name == "frames_of_the_grader", outcome
        assert not any(str(answer) in str(outcome.value) for answer in ANSWERS.values())
        assert "alive" not in str(outcome.value)
        if name == "environment":
            assert outcome.value == []


@pytest.mark.parametrize("mode", MODES)
def test_every_protection_is_tried_and_holds(mode: str) -> None:
    assert available(mode)
    assert probe(mode).missing == () or mode == "limits"


@pytest.mark.parametrize("mode", MODES)
def test_the_user_is_nobody_and_rights_are_gone(mode: str) -> None:
    assert available(mode)
    program = """
def look():
    import os
    status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
    capabilities = {key: int(status[key], 16) for key in ("CapPrm", "CapEff", "CapAmb")}
    return os.getresuid(), os.getresgid(), os.getgroups(), capabilities, len(os.listdir("/proc/self/fd"))
"""
    (outcome,) = run_program(program, [()], SandboxSettings(mode=mode, **LIMITS), entry_point="look")
    if outcome.error is not None and "/proc/self" in outcome.error:
        pytest.skip(f"{mode}: no /proc to look at: {outcome.error}")
    users, groups, more, capabilities, descriptors = outcome.value
    assert 0 not in users + groups and 0 not in more
    assert set(capabilities.values()) == {0}
    assert descriptors <= 6  # the three standard ones, the two pipes, and this listing


def test_an_earlier_result_survives_a_later_crash() -> None:
    assert available("builtin")
    program = "import os\ndef solve(x):\n    if x == 2:\n        os._exit(0)\n    return x\n"
    outcomes = run_program(program, [(0,), (1,), (2,), (3,)], SandboxSettings(mode="builtin", **LIMITS), entry_point="solve")
    assert [outcome.value for outcome in outcomes] == [0, 1, None, None]
    assert "ended" in outcomes[2].error and "ended" in outcomes[3].error


def test_a_killed_worker_takes_its_sandbox_along() -> None:
    """The pool kills a worker with SIGKILL; the program it was running must not live on."""
    assert available("builtin")
    for mode in ("builtin", "bubblewrap"):
        if not probe(mode).works:
            continue
        program = (
            "import sys, time\nfrom megatron_antisd.grading.sandbox import Sandbox, SandboxSettings\n"
            f"sandbox = Sandbox(SandboxSettings(mode={mode!r}))\n"
            "job = {'kind': 'function', 'preamble': '', 'source': 'while True: pass', 'entry_point': 'f', 'inputs': [()], 'seconds': 60.0}\n"
            "sandbox.send(job, time.monotonic() + 10)\nprint('started', flush=True)\ntime.sleep(60)\n")
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout.readline() == "started\n"
            assert sandboxed_processes({worker.pid})
            worker.kill()
        assert_nothing_left({worker.pid})


def test_a_sandbox_that_cannot_be_set_up_says_why() -> None:
    with pytest.raises(SandboxError, match="unknown"):
        Sandbox(SandboxSettings(mode="unknown"))


def test_an_interpreter_that_the_programs_id_cannot_read_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    library = tmp_path / "home" / "python" / "os.py"
    library.parent.mkdir(parents=True)
    library.write_text("")
    stranger = 1_900_000_001
    assert closed_to(stranger, library) is None
    library.chmod(0o600)
    assert closed_to(stranger, library) == library
    (tmp_path / "home").chmod(0o700)
    assert closed_to(stranger, library) == tmp_path / "home"
    assert closed_to(os.getuid(), library) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's programs run under another id")
def test_a_private_interpreter_under_mere_limits_is_refused_plainly(tmp_path: Path) -> None:
    """A library of its own in a closed folder, as under /root: the probe says so instead of a failed import."""
    home = tmp_path / "home"
    (home / "lib").mkdir(parents=True)
    home.chmod(0o700)
    (home / "lib" / "os.py").write_text(Path(os.__file__).read_text())
    program = "from megatron_antisd.grading.sandbox_choice import probe\nimport os\nos.__file__ = {!r}\nprint(probe('limits').reason)"
    done = subprocess.run([sys.executable, "-c", program.format(str(home / "lib" / "os.py"))], capture_output=True, text=True, timeout=60, check=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    assert "cannot read the interpreter" in done.stdout and "is closed to others" in done.stdout


def test_a_program_that_speaks_no_frames_has_ended() -> None:
    assert available("builtin")
    program = "import os\nfor descriptor in range(3, 9):\n    try:\n        os.write(descriptor, b'x' * 100)\n    except OSError:\n        pass\n"
    with Sandbox(SandboxSettings(mode="builtin", **LIMITS)) as sandbox:
        deadline = time.monotonic() + 5
        sandbox.send({"kind": "function", "preamble": "", "source": program, "entry_point": "f", "inputs": [], "seconds": 1.0}, deadline)
        with pytest.raises(SandboxEndedError):
            while True:
                sandbox.receive(deadline)


@pytest.mark.parametrize("wanted", ["auto", *MODES])
def test_choosing_a_mode(wanted: str) -> None:
    def found(mode: str) -> Probe:
        return Probe(mode=mode, works=mode != "bubblewrap", reason="it is absent", missing=("files", "pids") if mode == "limits" else ())

    if wanted == "bubblewrap":
        with pytest.raises(SandboxError, match=r"grading.sandbox=bubblewrap.*it is absent.*apt-get install bubblewrap"):
            decide(wanted, False, found)
    elif wanted == "limits":
        with pytest.raises(SandboxError, match="host's files cannot be read.*allow_weak_sandbox"):
            decide(wanted, False, found)
        assert decide(wanted, True, found).mode == "limits"
    else:
        assert decide(wanted, False, found).mode == "builtin"


def test_auto_refuses_what_only_limits() -> None:
    def found(mode: str) -> Probe:
        return Probe(mode=mode, works=mode == "limits", reason="the kernel says no", missing=("files",))

    with pytest.raises(SandboxError, match="bubblewrap does not work .the kernel says no.*builtin does not work.*only resource limits"):
        decide("auto", False, found)
    assert decide("auto", True, found).mode == "limits"


def test_start_up_logs_one_line_with_the_mode(caplog: pytest.LogCaptureFixture) -> None:
    assert available("builtin")
    with caplog.at_level("INFO"):
        settings = choose_sandbox(GradingConfig(sandbox="builtin", code_seconds=7.0, case_seconds=9.0))
    assert settings == SandboxSettings(mode="builtin", seconds=7.0, case_seconds=7.0, memory_bytes=1 << 30)
    (line,) = caplog.messages
    assert "'builtin'" in line and ("every protection" in line) == (not probe("builtin").missing)
    assert all(PROTECTIONS[key] in line for key in probe("builtin").missing)


def test_a_regular_expressions_match_is_opaque() -> None:
    assert available("builtin")
    (outcome,) = run_program("import re\ndef f(): return re.match('a', 'a')", [()], SandboxSettings(mode="builtin", **LIMITS), entry_point="f")
    assert isinstance(outcome.value, Opaque) and outcome.value.kind == "Match"
    program = "```python\nimport re\ndef f(x): return re.match('a', x)\n```"
    tests = CodeTests(entry_point="f", cases=(("('a',)", "True"), ("('b',)", "False")), compare="not_none")
    assert grade_code(program, tests, SandboxSettings(mode="builtin", **LIMITS)).reward == 1.0
