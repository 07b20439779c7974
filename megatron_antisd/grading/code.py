"""Does a response's program pass the hidden tests? Run in a sandbox, compared outside of it.

What is expected never reaches the process that runs the program. Cases are compared here, on plain values that came over a pipe;
assertions and checkers are the data set's code and run in a second sandbox, whose `candidate` relays each call to the first.
"""

from __future__ import annotations

import hashlib
import marshal
import time
from dataclasses import dataclass
from typing import Any

from megatron_antisd.grading.compare import COMPARISONS, matches, same_text
from megatron_antisd.grading.encoding import Opaque, decode
from megatron_antisd.grading.extraction import extract_program
from megatron_antisd.grading.parsed import ParsedCases
from megatron_antisd.grading.sandbox import (
    MAX_FRAME_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_VALUE_BYTES,
    Sandbox,
    SandboxEndedError,
    SandboxSettings,
    SandboxTimeoutError,
    start_sandbox,
)
from megatron_antisd.grading.verdict import NO_PROGRAM, OUT_OF_TIME, GradingError, Verdict
from megatron_antisd.records import CodeTests

MAX_PROGRAM_CHARACTERS = 4 << 20
MAX_CHECKED_BYTES = 4 << 20
"""Of an output that a checker is given; a larger one fails its case."""
CASES_TRIED = 3
"""Whose expected values a checker is tried on before it judges outputs."""
MAX_MESSAGE = 300
CASE_FEEDBACK = "Your code passes {passed} of {count} test cases."
NO_PROGRAM_FEEDBACK = "Your answer contains no code block."

_parsed = ParsedCases()
_tried_checkers: set[bytes] = set()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a program on one input."""

    value: Any = None
    """The value that came back, an `Opaque` where it is none that can be compared; of a program on standard input the text it wrote."""
    error: str | None = None
    """Why there is no value: what was raised, or that time was up or the process ended."""


def grade_code(response: str, tests: CodeTests, settings: SandboxSettings) -> Verdict:
    """The share of tests that the response's program passes. Raises GradingError for tests that can pass nobody, SandboxError."""
    check_tests(tests)
    program = extract_program(response)
    if program is None:
        return Verdict(reward=0.0, feedback=NO_PROGRAM_FEEDBACK, outcome=NO_PROGRAM)
    passed, late = count_passed(program, tests, settings)
    feedback = CASE_FEEDBACK.format(passed=passed, count=tests.count)
    return Verdict(reward=passed / tests.count, feedback=feedback, **({"outcome": OUT_OF_TIME} if late else {}))


def count_passed(program: str, tests: CodeTests, settings: SandboxSettings) -> tuple[int, bool]:
    """(tests passed, whether the program's time ran out). Raises GradingError where the checker judges no value that is expected."""
    if len(program) > MAX_PROGRAM_CHARACTERS:
        return 0, False
    passed = 0
    late = False
    if tests.cases:
        inputs, expected = _parsed.get(tests.cases, tests.entry_point is not None)
        if tests.checker is not None:
            _try_checker(tests, inputs, expected, settings)
        outcomes, late = _run(program, tests, inputs, settings)
        good = [(given, outcome.value, wanted) for given, outcome, wanted in zip(inputs, outcomes, expected, strict=True) if outcome.error is None]
        passed, slow = (_compared if tests.checker is None else _checked)(tests, good, settings)
        late = late or slow
    if tests.assertions and not late:
        more, late = _asserted(program, tests, settings)
        passed += more
    return passed, late


def run_program(program: str, inputs: list[Any], settings: SandboxSettings, *, entry_point: str | None = None, preamble: str = "") -> list[Outcome]:
    """Run untrusted code on each input and give what came back; for graders of one's own.

    With an entry point each input is the tuple of its arguments, plain values; without one the text on standard input, and the outcomes
    are the texts written to standard output. A program that cannot even be loaded has that as the error of every outcome.
    """
    tests = CodeTests(entry_point=entry_point, preamble=preamble)
    return _run(program, tests, inputs, settings)[0]


def check_tests(tests: CodeTests) -> None:
    """Raises GradingError where the tests themselves are broken: a grader that can pass nobody must not look like a weak policy."""
    if tests.count == 0:
        raise GradingError("a programming task has no tests: expected CodeTests with cases or assertions; drop the problem from the data")
    if tests.compare not in COMPARISONS:
        raise GradingError(f"CodeTests.compare is {tests.compare!r}, expected one of {', '.join(COMPARISONS)}")
    if tests.assertions and tests.entry_point is None:
        raise GradingError("CodeTests with assertions need an entry_point, the name of the function that they call")
    if tests.cases:
        _parsed.get(tests.cases, tests.entry_point is not None)


def _run(program: str, tests: CodeTests, inputs: list[Any], settings: SandboxSettings) -> tuple[list[Outcome], bool]:
    """The outcome of each input, and whether the program's time ran out."""
    outcomes: list[Outcome | None] = [None] * len(inputs)
    job = {"kind": "function" if tests.entry_point is not None else "program", "preamble": tests.preamble, "source": program,
           "entry_point": tests.entry_point, "inputs": inputs, "seconds": settings.case_seconds, "output_bytes": MAX_OUTPUT_BYTES}
    why, late = "the process ended", False
    largest = MAX_FRAME_BYTES if tests.entry_point is None else MAX_VALUE_BYTES
    with start_sandbox(settings) as sandbox:
        deadline = time.monotonic() + settings.seconds
        try:
            sandbox.send(job, deadline)
            left = len(inputs)
            while left:
                frame = sandbox.receive(deadline, largest)
                if frame[0] == "broken":
                    why = _text(frame[-1])
                    break
                left -= _settle(outcomes, frame)
        except SandboxTimeoutError:
            why, late = f"out of time: {settings.seconds:g} s for all tests", True
        except SandboxEndedError as error:
            why = f"the process ended: {error}"
    return [Outcome(error=why) if outcome is None else outcome for outcome in outcomes], late


def _settle(outcomes: list[Outcome | None], frame: list[Any]) -> bool:
    """Take in what one frame says of one input, if it is the first word on it; returns whether it was. Raises SandboxEndedError for a
    frame that is none."""
    match frame:
        case ["loaded"]:
            return False
        case ["case" | "failed" as kind, int(index), content] if 0 <= index < len(outcomes):
            if outcomes[index] is not None:
                return False
            outcomes[index] = Outcome(value=_value(content)) if kind == "case" else Outcome(error=_text(content))
            return True
    raise SandboxEndedError("it sent what is no frame")


def _text(content: Any) -> str:
    return content[:MAX_MESSAGE] if isinstance(content, str) else "it sent no message"


def _value(content: Any) -> Any:
    try:
        return decode(content)
    except ValueError:
        return Opaque("unreadable value")


def _compared(tests: CodeTests, items: list[tuple[Any, Any, Any]], settings: SandboxSettings) -> tuple[int, bool]:
    """(how many of (input, output, expected) agree, whether comparing them took too long)."""
    deadline, passed = time.monotonic() + settings.seconds, 0
    for _, output, wanted in items:
        if time.monotonic() > deadline:
            return passed, True
        if tests.entry_point is not None:
            passed += matches(output, wanted, tests.compare, tests.tolerance)
        else:
            passed += isinstance(output, str) and same_text(output, wanted, tests.tolerance)
    return passed, False


def _try_checker(tests: CodeTests, inputs: list[Any], expected: list[Any], settings: SandboxSettings) -> None:
    """Raises GradingError for a checker that cannot be loaded, or cannot judge what is expected itself. Once for a problem's tests.

    Only the data set's own values decide on that. What happens to a checker that holds a program's values is the program's doing.
    """
    key = hashlib.sha256(repr((tests.checker, tests.cases[:CASES_TRIED])).encode("utf-8", "surrogatepass")).digest()
    if key in _tried_checkers:
        return
    items = [(given, wanted, wanted) for given, wanted in zip(inputs[:CASES_TRIED], expected[:CASES_TRIED], strict=True)]
    outcomes, _ = _judged(tests.checker, items, settings)
    if all(outcome.error is not None for outcome in outcomes):
        raise GradingError(f"CodeTests.checker judges not even the expected values ({outcomes[0].error}): expected source that defines "
                           "check(arguments, output, expected) and can judge output = expected")
    _tried_checkers.add(key)


def _checked(tests: CodeTests, items: list[tuple[Any, Any, Any]], settings: SandboxSettings) -> tuple[int, bool]:
    """(how many (arguments, output, expected) the data set's checker accepts, whether time ran out)."""
    items = [item for item in items if not isinstance(item[1], Opaque) and len(marshal.dumps(item[1])) <= MAX_CHECKED_BYTES]
    if not items:
        return 0, False
    outcomes, late = _judged(tests.checker, items, settings)
    return sum(outcome.value is True for outcome in outcomes), late


def _judged(checker: str, items: list[tuple[Any, Any, Any]], settings: SandboxSettings) -> tuple[list[Outcome], bool]:
    """What the checker says of each (arguments, output, expected), in a sandbox where the program has never been; whether time ran out.

    One item at a time: each output may be large, and what the checker said of those before stands when one of them ends it.
    """
    outcomes: list[Outcome] = []
    why, late = "the process ended", False
    with start_sandbox(settings) as judge:
        deadline = time.monotonic() + settings.seconds
        try:
            judge.send({"kind": "checks", "source": checker, "seconds": settings.case_seconds}, deadline)
            frame = judge.receive(deadline)
            if frame[0] == "loaded":
                for item in items:
                    judge.send(item, deadline)
                    frame = judge.receive(deadline)
                    outcomes.append(Outcome(value=frame[-1]) if frame[0] == "case" else Outcome(error=_text(frame[-1])))
            else:
                why = _text(frame[-1])
        except SandboxTimeoutError:
            why, late = f"out of time: {settings.seconds:g} s for all values", True
        except SandboxEndedError as error:
            why = f"the process ended: {error}"
    return outcomes + [Outcome(error=why)] * (len(items) - len(outcomes)), late


def _asserted(program: str, tests: CodeTests, settings: SandboxSettings) -> tuple[int, bool]:
    """(assertions that hold, whether time ran out)."""
    passed, calls = 0, {"kind": "calls", "preamble": tests.preamble, "source": program, "entry_point": tests.entry_point,
                        "seconds": settings.case_seconds}
    tries = {"kind": "assertions", "preamble": tests.preamble, "entry_point": tests.entry_point, "assertions": list(tests.assertions)}
    with start_sandbox(settings) as runner, start_sandbox(settings) as judge:
        deadline = time.monotonic() + settings.seconds
        try:
            runner.send(calls, deadline)
            if runner.receive(deadline) != ["loaded"]:
                return 0, False
        except (SandboxTimeoutError, SandboxEndedError) as error:
            return 0, isinstance(error, SandboxTimeoutError)
        try:
            judge.send(tries, deadline)
            for _ in tests.assertions:
                while (frame := judge.receive(deadline))[0] == "call":
                    judge.send(_relayed(runner, decode(frame[2]), deadline), deadline)
                passed += frame[0] == "case"
        except SandboxTimeoutError:
            return passed, True
        except SandboxEndedError:
            pass  # an assertion ended its own process: it and those after it have not passed
    return passed, False


def _relayed(runner: Sandbox, call: Any, deadline: float) -> tuple[str, Any]:
    """One call of the program's function: what the judge is told of it. A dead program's calls are lost, and with them their assertions."""
    if isinstance(call, Opaque):
        return "lost", f"an argument is a {call.kind}, which cannot be handed to the program"
    try:
        runner.send(call, deadline)
        frame = runner.receive(deadline, MAX_VALUE_BYTES)
    except SandboxEndedError:
        return "lost", "the program's process has ended"
    if frame[0] != "case":
        return "raise", _text(frame[-1])
    value = _value(frame[-1])
    return ("lost", f"the program returned a {value.kind}") if isinstance(value, Opaque) else ("value", value)
