"""What runs inside a sandbox: shut in, read one job, run it, and send what it gave, piece by piece. The standard library alone.

The process is started afresh for every program. Frames come on descriptor 0 (4 bytes of length, then `marshal`, which only the trusted
side writes) and go out on descriptor 1 (4 bytes of length, then JSON). Nothing that goes out is trusted: a program that forges frames
gains what it could have returned anyway, since what a test expects is never in here.

Frames out: ["ready"], then ["loaded"] or ["broken", why], then by kind of job
    function    ["case", i, value] or ["failed", i, why] for each input
    calls       the same for each ["call"] frame that comes, until the pipe ends
    program     ["case", i, text] or ["failed", i, why] for each standard input
    assertions  ["case", i, true] or ["failed", i, why]; in between ["call", 0, [arguments, keywords]], answered by a frame
    checks      ["case", 0, bool] or ["failed", 0, why] for each (arguments, output, expected) that comes, until the pipe ends
"""

from __future__ import annotations

import _signal
import builtins
import marshal
import os
import select
import sys
import time

from megatron_antisd.grading.encoding import encode, quote
from megatron_antisd.grading.sandbox_inside import add_filter, enter

MAX_MESSAGE = 300
MAX_LATE = 3
"""Cases that may run out of time before the rest is given up: a program that hangs must not cost the time of all of them."""
OUT_OF_TIME = "out of time"
_OURS = "megatron_antisd"


class CaseTimeout(BaseException):  # noqa: N818  (what the program sees when its case is over)
    """The case ran out of time. No Exception, so that `except Exception` in the program lets it pass."""


class CallLost(BaseException):  # noqa: N818  (as above)
    """A call that gave neither a value nor an exception. No Exception, so that no test takes it for one that it waits for."""


class _Wire:
    """The two pipes to the trusted side, out of the standard descriptors' way."""

    def __init__(self) -> None:
        self.requests, self.results = os.dup(0), os.dup(1)
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1):
            os.dup2(nothing, standard)
        os.close(nothing)

    def send(self, text: str) -> None:
        data = text.encode()
        data = len(data).to_bytes(4, "little") + data
        while data:
            data = data[os.write(self.results, data) :]

    def receive(self) -> object:
        return marshal.loads(self._exactly(int.from_bytes(self._exactly(4), "little")))

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = os.read(self.requests, min(count, 1 << 20))
            if not part:
                os._exit(0)  # the trusted side is gone
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def failed(self, index: int, error: BaseException) -> None:
        self.send(f'["failed",{index},{quote(_describe(error))}]')


def main(config: dict) -> None:
    """The process's whole life."""
    wire = _Wire()
    try:
        enter(config)
    except Exception as error:
        wire.send(f'["setup",{quote(_describe(error))}]')
        os._exit(1)
    os.dup2(0, 2)
    sys.path.extend(config["packages"])
    for name in [name for name in sys.modules if name.partition(".")[0] == _OURS]:
        del sys.modules[name]
    sys.argv[:] = ["program.py"]
    wire.send('["ready"]')
    job = wire.receive()
    _signal.signal(_signal.SIGALRM, _on_alarm)
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if config["program"] is not None and job["kind"] != "program":
        add_filter(config["program"])
    try:
        _JOBS[job["kind"]](wire, job, config)
    except BaseException:  # noqa: B036  (a late alarm, a broken pipe: the process ends here in any case)
        pass
    os._exit(0)  # no atexit, no finalizers: they are the program's


def _on_alarm(number: int, frame: object) -> None:
    raise CaseTimeout(OUT_OF_TIME)


def _timed(seconds: float, call: object, *arguments: object) -> object:
    _signal.signal(_signal.SIGALRM, _on_alarm)
    _signal.setitimer(_signal.ITIMER_REAL, seconds, seconds)  # again and again: a bare `except` may catch the first
    try:
        return call(*arguments)
    finally:
        _signal.setitimer(_signal.ITIMER_REAL, 0)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MAX_MESSAGE]
    except BaseException:  # noqa: B036  (its __str__ is the program's)
        return "an error without a message"


def _load(wire: _Wire, job: dict) -> object:
    """The entry point of the program, or None after having said why there is none."""
    module = type(sys)("__program__")
    sys.modules["__program__"] = module
    try:
        _timed(job["seconds"], _execute, (job["preamble"], job["source"]), module.__dict__)
        function = _find(module.__dict__, job["entry_point"])
    except BaseException as error:  # noqa: B036  (SystemExit, CaseTimeout and whatever the program raises)
        wire.send(f'["broken",{quote(_describe(error))}]')
        return None
    wire.send('["loaded"]')
    return function


def _execute(sources: tuple, namespace: dict) -> None:
    for source in sources:
        exec(compile(source, "<program>", "exec", dont_inherit=True), namespace)


def _find(namespace: dict, name: str) -> object:
    if name in namespace:
        return namespace[name]
    if "Solution" in namespace and hasattr(namespace["Solution"], name):  # the form of LeetCode's tasks
        return getattr(namespace["Solution"](), name)
    raise NameError(f"the program defines no {name!r}")


def _run_function(wire: _Wire, job: dict, config: dict) -> None:
    function = _load(wire, job)
    if function is not None:
        late = 0
        for index, arguments in enumerate(job["inputs"]):
            late += _one(wire, index, job["seconds"], function, arguments, {})
            if late == MAX_LATE:
                return


def _run_calls(wire: _Wire, job: dict, config: dict) -> None:
    function = _load(wire, job)
    late = 0
    while function is not None and late < MAX_LATE:
        arguments, keywords = wire.receive()
        late += _one(wire, 0, job["seconds"], function, arguments, keywords)


def _one(wire: _Wire, index: int, seconds: float, function: object, arguments: object, keywords: dict) -> bool:
    """One call; returns whether it ran out of time."""
    try:
        text = _timed(seconds, lambda: encode(function(*arguments, **keywords)))
    except BaseException as error:  # noqa: B036  (whatever the program raises is this case's failure)
        wire.failed(index, error)
        return isinstance(error, CaseTimeout)
    wire.send(f'["case",{index},{text}]')
    return False


def _run_assertions(wire: _Wire, job: dict, config: dict) -> None:
    """The data set's code, with the program's function replaced by a relay to the process where it runs."""
    def candidate(*arguments: object, **keywords: object) -> object:
        wire.send(f'["call",0,{encode([arguments, keywords])}]')
        kind, value = wire.receive()
        if kind == "value":
            return value
        if kind == "lost":
            raise CallLost(value)
        name, _, message = value.partition(": ")
        known = getattr(builtins, name, None)
        if not isinstance(known, type) or not issubclass(known, Exception) or issubclass(known, StopIteration | StopAsyncIteration):
            raise RuntimeError(value)  # the end of an iteration would end the test's own loop, as if all were checked
        raise known(message)

    for index, assertion in enumerate(job["assertions"]):
        namespace = {"__name__": "__tests__"}
        try:
            _execute((job["preamble"],), namespace)
            namespace |= {"candidate": candidate, job["entry_point"]: candidate}
            _execute((assertion,), namespace)
        except BaseException as error:  # noqa: B036  (AssertionError above all)
            wire.failed(index, error)
        else:
            wire.send(f'["case",{index},true]')


def _run_checks(wire: _Wire, job: dict, config: dict) -> None:
    namespace = {"__name__": "__tests__"}
    try:
        _timed(job["seconds"], _execute, (job["source"],), namespace)
        check = namespace["check"]
    except BaseException as error:  # noqa: B036  (a source that cannot be loaded, or defines no check)
        wire.send(f'["broken",{quote(_describe(error))}]')
        return
    wire.send('["loaded"]')
    while True:
        arguments, output, expected = wire.receive()
        try:
            passed = bool(_timed(job["seconds"], check, arguments, output, expected))
        except BaseException as error:  # noqa: B036  (a check that cannot judge a value has not passed it)
            wire.failed(0, error)
        else:
            wire.send(f'["case",0,{"true" if passed else "false"}]')


def _run_program(wire: _Wire, job: dict, config: dict) -> None:
    """A fork for each standard input, with nothing of ours but its three standard descriptors."""
    try:
        code = _timed(job["seconds"], compile, job["source"], "<program>", "exec", 0, True)
        _execute((job["preamble"],), {"__name__": "__preamble__"})
    except BaseException as error:  # noqa: B036  (SyntaxError, and RecursionError, MemoryError, ... for a hostile source)
        wire.send(f'["broken",{quote(_describe(error))}]')
        return
    wire.send('["loaded"]')
    late = 0
    for index, text in enumerate(job["inputs"]):
        if late == MAX_LATE:
            return
        output, why = _one_input(code, job, text, config, wire)
        late += why == OUT_OF_TIME
        wire.send(f'["case",{index},{quote(output)}]' if why is None else f'["failed",{index},{quote(why)}]')


def _one_input(code: object, job: dict, text: str, config: dict, wire: _Wire) -> tuple:
    """(standard output, None), or ("", why it failed)."""
    path = f"{config['scratch']}/.input"
    with open(path, "wb") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
    given = os.open(path, os.O_RDONLY)
    os.unlink(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(code, job, config, given, writing)
    os.close(given)
    os.close(writing)
    parts, room, deadline, why = [], job["output_bytes"], time.monotonic() + job["seconds"], None
    while True:
        if not select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            why = OUT_OF_TIME
            break
        part = os.read(reading, 1 << 16)
        if not part:
            break
        parts.append(part)
        room -= len(part)
        if room < 0:
            why = "too much output"
            break
    os.close(reading)
    status = _end(child, deadline if why is None else 0.0)
    if why is None and status != 0:
        why = f"ended with exit code {status}" if status is not None else OUT_OF_TIME
    return b"".join(parts).decode("utf-8", "replace"), why


def _end(child: int, deadline: float) -> object:
    """Its exit code (negative: the signal), None where it had to be killed."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, _signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.001)


def _child(code: object, job: dict, config: dict, given: int, writing: int) -> None:
    """The program itself, in the fork. Never returns."""
    status = 1
    try:
        os.dup2(given, 0)
        os.dup2(writing, 1)
        os.closerange(3, 256)
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
        if config["program"] is not None:
            add_filter(config["program"])
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        _execute((job["preamble"],), module.__dict__)
        exec(code, module.__dict__)
        status = 0
    except SystemExit as left:
        status = 0 if left.code in (None, 0) else 1
    except BaseException:  # noqa: B036  (a program that raises has failed this input)
        status = 1
    try:
        sys.stdout.flush()
    except BaseException:  # noqa: B036  (closed by the program, say)
        pass
    os._exit(status)


_JOBS = {"function": _run_function, "calls": _run_calls, "assertions": _run_assertions, "checks": _run_checks, "program": _run_program}
