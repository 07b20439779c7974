"""Does a response's program pass the hidden tests? Run in a sandbox, compared outside of it.

What is expected never reaches the process that runs the program. Cases are compared here, on plain values that came over a pipe;
assertions and checkers are the data set's code and run in a second sandbox, whose `candidate` relays each call to the first.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

from megatron_antisd.grading.compare import COMPARISONS, matches, same_text
from megatron_antisd.grading.encoding import Opaque, decode
from megatron_antisd.grading.extraction import extract_program
from megatron_antisd.grading.literals import parse_literal
from megatron_antisd.grading.sandbox import (
    MAX_OUTPUT_BYTES,
    Sandbox,
    SandboxEndedError,
    SandboxSettings,
    SandboxTimeoutError,
    start_sandbox,
)
from megatron_antisd.grading.verdict import NO_PROGRAM, OUT_OF_TIME, GradingError, Verdict
from megatron_antisd.records import CodeTests

MAX_PROGRAM_CHARACTERS = 4 << 20
CASE_FEEDBACK = "Your code passes {passed} of {count} test cases."
NO_PROGRAM_FEEDBACK = "Your answer contains no code block."


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
    """(tests passed, whether the program's time ran out)."""
    if len(program) > MAX_PROGRAM_CHARACTERS:
        return 0, False
    passed = 0
    late = False
    if tests.cases:
        inputs, expected = _parsed(tests.cases, tests.entry_point is not None)
        outcomes, late = _run(program, tests, inputs, settings)
        good = [(given, outcome.value, wanted) for given, outcome, wanted in zip(inputs, outcomes, expected, strict=True) if outcome.error is None]
        if tests.checker is not None:
            passed += _checked(tests, good, settings)
        elif tests.entry_point is None:
            passed += sum(same_text(output, wanted, tests.tolerance) for _, output, wanted in good)
        else:
            passed += sum(matches(output, wanted, tests.compare, tests.tolerance) for _, output, wanted in good)
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
        _parsed(tests.cases, tests.entry_point is not None)


@functools.lru_cache(maxsize=64)
def _parsed(cases: tuple[tuple[str, str], ...], literals: bool) -> tuple[list[Any], list[Any]]:
    """(inputs, expected). The rollouts of a problem share them; nobody changes them."""
    if not literals:
        return [given for given, _ in cases], [wanted for _, wanted in cases]
    try:
        inputs = [parse_literal(given) for given, _ in cases]
        expected = [parse_literal(wanted) for _, wanted in cases]
    except ValueError as error:
        raise GradingError(f"a test case is {error}; CodeTests.cases of a function hold Python literals") from error
    for arguments in inputs:
        if not isinstance(arguments, tuple):
            raise GradingError(f"the input of a test case is {arguments!r:.100}, expected the tuple of the function's arguments")
    return inputs, expected


def _run(program: str, tests: CodeTests, inputs: list[Any], settings: SandboxSettings) -> tuple[list[Outcome], bool]:
    """The outcome of each input, and whether the program's time ran out."""
    outcomes: list[Outcome | None] = [None] * len(inputs)
    job = {"kind": "function" if tests.entry_point is not None else "program", "preamble": tests.preamble, "source": program,
           "entry_point": tests.entry_point, "inputs": inputs, "seconds": settings.case_seconds, "output_bytes": MAX_OUTPUT_BYTES}
    why, late = "the process ended", False
    with start_sandbox(settings) as sandbox:
        deadline = time.monotonic() + settings.seconds
        try:
            sandbox.send(job, deadline)
            left = len(inputs)
            while left:
                frame = sandbox.receive(deadline)
                if frame[0] == "broken":
                    why = str(frame[-1])
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
            outcomes[index] = Outcome(value=_value(content)) if kind == "case" else Outcome(error=str(content))
            return True
    raise SandboxEndedError("it sent what is no frame")


def _value(content: Any) -> Any:
    try:
        return decode(content)
    except ValueError:
        return Opaque("unreadable value")


def _checked(tests: CodeTests, items: list[tuple[Any, Any, Any]], settings: SandboxSettings) -> int:
    """How many (arguments, output, expected) the data set's checker accepts, in a sandbox where the program has never been."""
    items = [item for item in items if not isinstance(item[1], Opaque)]
    if not items:
        return 0
    results: list[Outcome | None] = [None] * len(items)
    with start_sandbox(settings) as judge:
        deadline = time.monotonic() + settings.seconds
        try:
            judge.send({"kind": "checks", "source": tests.checker, "items": items, "seconds": settings.case_seconds}, deadline)
            left = len(items)
            while left:
                left -= _settle(results, judge.receive(deadline))
        except (SandboxTimeoutError, SandboxEndedError) as error:
            if all(result is None for result in results):
                raise GradingError("CodeTests.checker judged nothing: expected source that defines check(arguments, output, expected)") from error
    return sum(result is not None and result.value is True for result in results)


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
        frame = runner.receive(deadline)
    except SandboxEndedError:
        return "lost", "the program's process has ended"
    if frame[0] != "case":
        return "raise", str(frame[-1])
    value = _value(frame[-1])
    return ("lost", f"the program returned a {value.kind}") if isinstance(value, Opaque) else ("value", value)
