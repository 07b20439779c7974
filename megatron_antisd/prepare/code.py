"""Rows of published programming data sets -> (prompt, CodeTests).

Read are EvalPlus' releases (HumanEvalPlus.jsonl, MbppPlus.jsonl) and its Hugging Face forms (evalplus/humanevalplus, evalplus/mbppplus),
HumanEval, MBPP, and tests as APPS, TACO and verl keep them: `{"inputs": [...], "outputs": [...]}`, with an `fn_name` or without.
EvalPlus' releases carry inputs alone; what is expected is what the canonical solution gives, run in the sandbox.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_antisd.grading.code import Outcome, run_program
from megatron_antisd.grading.encoding import TOO_LARGE, Opaque
from megatron_antisd.grading.literals import parse_literal, to_literal
from megatron_antisd.grading.sandbox import SandboxSettings
from megatron_antisd.records import CodeTests

FLOAT_TOLERANCE = 1e-6
"""Of EvalPlus, where a task names none and floats are expected."""
CANONICAL_SECONDS = 120.0
MAX_EXPECTED_CHARACTERS = 1 << 20

logger = logging.getLogger(__name__)


class CodeRowError(ValueError):
    """A row from which no tests can be made; the message says what is missing or wrong."""


def code_problem(row: Mapping[str, Any], settings: SandboxSettings) -> tuple[str, CodeTests]:
    """(prompt, tests) of one row, whose form is known by its columns. Raises CodeRowError."""
    if {"base_input", "canonical_solution", "entry_point"} <= row.keys():
        return _evalplus_release(row, settings)
    if {"test", "entry_point", "prompt"} <= row.keys():
        return _human_eval(row)
    if "test_list" in row:
        return _mbpp(row)
    tests = _inputs_and_outputs(row)
    if tests is not None:
        return _input_output(row, tests)
    raise CodeRowError(f"no known form of a programming task: the columns are {sorted(row)}; expected base_input and canonical_solution (EvalPlus), "
                       "test and entry_point (HumanEval), test_list (MBPP), or inputs and outputs (APPS, TACO, verl)")


def is_code_row(row: Mapping[str, Any]) -> bool:
    """Whether the row's columns are those of a programming task."""
    given = {column for column, value in row.items() if value is not None}  # a file of several kinds of tasks has every column in every row
    return "base_input" in given or {"test", "entry_point"} <= given or "test_list" in given or _inputs_and_outputs(row) is not None


# --- EvalPlus' releases ---------------------------------------------------------------------------------------------------------------


def _evalplus_release(row: Mapping[str, Any], settings: SandboxSettings) -> tuple[str, CodeTests]:
    task, entry_point = str(row["task_id"]), row["entry_point"]
    mbpp = task.startswith("Mbpp/")
    given = [*row["base_input"], *(row.get("plus_input") or [])]
    shape = _MBPP_SHAPES.get(int(task.rpartition("/")[2])) if mbpp else None
    inputs = [tuple(shape(arguments) if shape else arguments) for arguments in given]
    preamble = "" if mbpp else _before(row["prompt"], entry_point)
    solution = row["canonical_solution"] if mbpp else row["prompt"] + row["canonical_solution"]
    patient = replace(settings, seconds=max(settings.seconds, CANONICAL_SECONDS), case_seconds=max(settings.case_seconds, CANONICAL_SECONDS))
    outcomes = run_program(solution, inputs, patient, entry_point=entry_point)
    tests = _with_oracle(CodeTests(entry_point=entry_point, preamble=preamble, tolerance=float(row.get("atol") or 0.0)), mbpp)
    kept = [(given, outcome) for given, outcome in zip(inputs, outcomes, strict=True) if not _too_large(outcome)]
    if len(kept) < len(inputs):
        logger.warning("%s: %d of %d cases are left out, since what is expected is too large to keep", task, len(inputs) - len(kept), len(inputs))
    return row["prompt"], _with_cases(tests, [given for given, _ in kept], [_expected(task, outcome, tests.compare) for _, outcome in kept])


def _too_large(outcome: Outcome) -> bool:
    """Some inputs of EvalPlus make lists of gigabytes, which nobody could send to a grader with every rollout."""
    if outcome.error is not None:
        return outcome.error.startswith("MemoryError")
    if isinstance(outcome.value, Opaque):
        return outcome.value.kind == TOO_LARGE
    return len(to_literal(outcome.value)) > MAX_EXPECTED_CHARACTERS


def _expected(task: str, outcome: Outcome, compare: str) -> Any:
    if outcome.error is not None:
        raise CodeRowError(f"{task}: the canonical solution fails on one of the task's own inputs ({outcome.error})")
    if compare == "not_none":
        return outcome.value is not None
    if isinstance(outcome.value, Opaque):
        raise CodeRowError(f"{task}: the canonical solution gives a {outcome.value.kind}, which no test can compare")
    return outcome.value


def _with_cases(tests: CodeTests, inputs: Sequence[tuple[Any, ...]], expected: Sequence[Any]) -> CodeTests:
    cases = tuple((to_literal(given), to_literal(wanted)) for given, wanted in zip(inputs, expected, strict=True))
    tolerance = tests.tolerance or (FLOAT_TOLERANCE if any(map(_floats, expected)) else 0.0)
    return replace(tests, cases=cases, tolerance=tolerance)


def _floats(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, list | tuple) and bool(value) and all(isinstance(item, float) for item in value))


def _with_oracle(tests: CodeTests, mbpp: bool) -> CodeTests:
    """The tasks that EvalPlus does not compare by equality."""
    name = tests.entry_point
    if not mbpp:
        return replace(tests, checker=_FIND_ZERO.format(tolerance=tests.tolerance)) if name == "find_zero" else tests
    if name in _MBPP_CHECKERS:
        return replace(tests, checker=_MBPP_CHECKERS[name].format(tolerance=tests.tolerance))
    compare = "unordered" if name in _MBPP_UNORDERED else "not_none" if name in _MBPP_NOT_NONE else "equal"
    return replace(tests, compare=compare)


_MBPP_UNORDERED = {"similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum", "intersection_array",
                   "find_dissimilar", "Diff"}
_MBPP_NOT_NONE = {"check_str", "text_match_three", "text_starta_endb"}
_FIND_ZERO = """
def check(arguments, output, expected):
    return abs(sum(coefficient * output ** power for power, coefficient in enumerate(arguments[0]))) <= {tolerance!r}
"""
_MBPP_CHECKERS = {
    # Equivalence of two numbers in a sense that the text leaves open: any answer passes.
    "are_equivalent": "def check(arguments, output, expected):\n    return True\n",
    # The sum of proper divisors of 1: some say 0.
    "sum_div": "def check(arguments, output, expected):\n    return output == expected or output == 0\n",
    # A pyramid's height may be meant along the slope or straight up.
    "surface_Area": """
def check(arguments, output, expected):
    edge, height = arguments
    upright = round(edge * edge + 2 * edge * ((edge / 2) ** 2 + height * height) ** 0.5)
    return output == expected or abs(output - upright) <= {tolerance!r}
""",
    # Digits of two numbers side by side, the shorter one with zeros in front, or of their difference.
    "digit_distance_nums": """
def check(arguments, output, expected):
    first, second = map(str, arguments)
    width = max(len(first), len(second))
    aligned = sum(abs(int(a) - int(b)) for a, b in zip(first.rjust(width, "0"), second.rjust(width, "0")))
    return output == expected or output == aligned
""",
}


def _items_to_tuples(argument: Any) -> list[Any]:
    return [tuple(item) for item in argument]


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


def _shapes() -> dict[int, Callable[[list[Any]], Sequence[Any]]]:
    """What JSON cost the inputs of MBPP+: the arguments of a task, by its number, as its solution wants them."""
    shapes: dict[int, Callable[[list[Any]], Sequence[Any]]] = {
        115: lambda given: [[set(item) if isinstance(item, list) and item else {} for item in given[0]]],
        124: lambda given: [float(given[0]), complex(given[1])],
        252: lambda given: [complex(given[0])],
        278: lambda given: [tuple(tuple(item) if isinstance(item, list) else item for item in given[0])],
        307: lambda given: [tuple(given[0]), *given[1:]],
        722: lambda given: [{key: tuple(value) for key, value in given[0].items()}, *given[1:]],
    }
    for numbers, shape in (
        ((2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726, 740, 744, 809), _items_to_tuples),
        ((63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780), lambda given: [_items_to_tuples(one) for one in given]),
        ((75, 413, 444, 753), lambda given: [_items_to_tuples(given[0]), given[1]]),
        ((106, 750), lambda given: [given[0], tuple(given[1])]),
        ((250, 405, 446, 617, 720, 763, 808), lambda given: [tuple(given[0]), given[1]]),
        ((259, 401, 445), lambda given: [tuple(_items_to_tuples(one)) for one in given]),
        ((580, 615, 791), _deep_tuple),
    ):
        shapes |= dict.fromkeys(numbers, shape)
    return shapes


_MBPP_SHAPES = _shapes()


# --- HumanEval, MBPP and EvalPlus on Hugging Face -------------------------------------------------------------------------------------


def _human_eval(row: Mapping[str, Any]) -> tuple[str, CodeTests]:
    tests = CodeTests(entry_point=row["entry_point"], preamble=_before(row["prompt"], row["entry_point"]))
    listed = _listed_cases(row["test"])
    if listed is not None and row["entry_point"] != "find_zero":
        return row["prompt"], _with_cases(tests, *listed)
    return row["prompt"], replace(tests, assertions=_check_assertions(row["test"]))


def _mbpp(row: Mapping[str, Any]) -> tuple[str, CodeTests]:
    listed_tests = list(row["test_list"])
    if not listed_tests:
        raise CodeRowError(f"task {row.get('task_id')}: test_list is empty")
    entry_point = _called(listed_tests[0], row.get("code") or "")
    setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""]).strip()
    text = row.get("prompt") or row.get("text") or ""
    prompt = text if entry_point in text else f"{text}\n{listed_tests[0]}"  # a name that nobody gave cannot be found
    tests = CodeTests(entry_point=entry_point)
    listed = _listed_cases(row["test"]) if row.get("test") else None
    if listed is not None:
        return prompt, _with_cases(_with_oracle(tests, mbpp=True), *listed)
    assertions = [row["test"]] if row.get("test") else [*listed_tests, *(row.get("challenge_test_list") or [])]
    return prompt, replace(tests, assertions=tuple(f"{setup}\n{assertion}".strip() for assertion in assertions))


def _listed_cases(test: str) -> tuple[list[tuple[Any, ...]], list[Any]] | None:
    """EvalPlus' `inputs = [...]` and `results = [...]` of a test's code; None where they are absent or no literals."""
    found: dict[str, Any] = {}
    for node in ast.walk(_parsed(test, "test")):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("inputs", "results"):
            try:
                found[node.targets[0].id] = parse_literal(ast.get_source_segment(test, node.value) or "")
            except ValueError:
                return None
    if found.keys() != {"inputs", "results"} or len(found["inputs"]) != len(found["results"]):
        return None
    return [tuple(arguments) for arguments in found["inputs"]], list(found["results"])


def _check_assertions(test: str) -> tuple[str, ...]:
    """The body of `check(candidate)`, one test an assertion where it is nothing but assertions, else as one test."""
    tree = _parsed(test, "test")
    check = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    if check is None:
        raise CodeRowError("the column test defines no check(candidate)")
    around = "\n".join(ast.unparse(node) for node in tree.body if node is not check and not isinstance(node, ast.Expr))
    asserts = [node for node in check.body if isinstance(node, ast.Assert)]
    telling = [node for node in asserts if not isinstance(node.test, ast.Constant)]  # `assert True` tells nothing
    if len(asserts) == len(check.body) and telling:
        return tuple(f"{around}\n{ast.unparse(node)}".strip() for node in telling)
    return (f"{test}\ncheck(candidate)",)


def _before(prompt: str, entry_point: str) -> str:
    """The imports and helpers that a prompt gives beside the function to be written."""
    tree = _parsed(prompt, "prompt")
    kept = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == entry_point)]
    return "\n\n".join(ast.unparse(node) for node in kept)


def _called(assertion: str, solution: str) -> str:
    """The function that an assertion tests: of the names it calls the one that the solution defines, the last of its functions first."""
    calls = {node.func.id for node in ast.walk(_parsed(assertion, "test_list")) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    defined = [node.name for node in _parsed(solution, "code").body if isinstance(node, ast.FunctionDef) and node.name in calls]
    if not defined:
        raise CodeRowError(f"the test {assertion[:100]!r} calls {sorted(calls)}, none of which the column code defines")
    return defined[-1]


def _parsed(source: str, column: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CodeRowError(f"the column {column} is not Python ({type(error).__name__}: {error}): {source[:100]!r}") from error


# --- inputs and outputs ---------------------------------------------------------------------------------------------------------------


def _inputs_and_outputs(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The mapping with `inputs` and `outputs`: the row itself, or a column that holds it, as JSON text perhaps."""
    reward_model = row.get("reward_model")
    candidates = [row, row.get("input_output"), reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None]
    for candidate in candidates:
        if isinstance(candidate, str):
            try:
                candidate = json.loads(candidate)
            except ValueError:
                continue
        if isinstance(candidate, Mapping) and {"inputs", "outputs"} <= candidate.keys():
            return candidate
    return None


def _input_output(row: Mapping[str, Any], tests: Mapping[str, Any]) -> tuple[str, CodeTests]:
    inputs, outputs, name = list(tests["inputs"]), list(tests["outputs"]), tests.get("fn_name")
    if not inputs or len(inputs) != len(outputs):
        raise CodeRowError(f"{len(inputs)} inputs and {len(outputs)} outputs, expected as many of both and at least one")
    prompt = _question(row)
    starter = row.get("starter_code")
    if starter and starter not in prompt:
        prompt = f"{prompt}\n\n{starter}"
    if name is None:
        return prompt, CodeTests(entry_point=None, cases=tuple((_text(given), _text(wanted)) for given, wanted in zip(inputs, outputs, strict=True)))
    arguments = [tuple(map(json.loads, given.splitlines())) if isinstance(given, str) else tuple(given) for given in inputs]
    expected = [json.loads(wanted) if isinstance(wanted, str) and isinstance(given, str) else wanted
                for given, wanted in zip(inputs, outputs, strict=True)]
    if all(isinstance(wanted, list) and len(wanted) == 1 for wanted in expected):
        checker = _JSON_CHECKER.format(accepted="expected, expected[0]")  # APPS wraps each output in a list, but not in every task
    else:
        checker = _JSON_CHECKER.format(accepted="expected,")
    return prompt, replace(_with_cases(CodeTests(entry_point=name), arguments, expected), checker=checker)


_JSON_CHECKER = """
def plain(value):
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {{str(key): plain(item) for key, item in value.items()}} if isinstance(value, dict) else value

def check(arguments, output, expected):
    return plain(output) in ({accepted})
"""


def _question(row: Mapping[str, Any]) -> str:
    given = row.get("question") or row.get("prompt") or row.get("problem") or row.get("description")
    if isinstance(given, str):
        return given
    if given is not None and not isinstance(given, Mapping) and len(given):  # verl keeps a chat
        return str(given[-1]["content"])
    raise CodeRowError(f"no question: the columns are {sorted(row)}; expected question, prompt, problem or description")


def _text(value: Any) -> str:
    """Standard input or output; some rows keep a list of lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value)) + "\n"
