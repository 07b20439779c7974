"""The house rules that a reader can rely on: who may import whom, sizes, types, and no trace of any one machine."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_antisd"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60  # without the docstring
WARN_FUNCTION_LINES = 50
MAX_LOOP_LINES = 120

# What each room (a folder, or a module at the top) may import of the package. An entry "room.module" stands for that module
# alone, on either side.
MAY_IMPORT: dict[str, set[str]] = {
    "durable": set(),
    "token_routes": set(),
    "records": {"token_routes"},
    "config": set(),
    "compat": set(),
    "wire": set(),
    "algorithm": {"records"},
    "data": {"records", "config", "token_routes"},
    "grading": {"records", "config"},
    "models": {"config", "compat"},
    "parallel": {"models", "algorithm", "records", "config", "compat", "data.packing", "token_routes", "wire"},
    "checkpoint": {"parallel", "models", "algorithm", "data", "records", "config", "compat"},
    "metrics": {"records", "config"},
    "reporting": {"records", "config", "metrics"},
    "batch": {"algorithm", "records", "config"},
    "token_u": {"records", "config"},
    "routing": {"records", "config", "rollout", "token_routes"},
    "rollout": {"records", "config", "compat", "token_routes", "wire"},
    "rollout.megatron_engine": {"records", "config", "compat", "parallel", "models"},
    "supervision": {"config"},
    "health": {"config", "records"},
    "planning": {"records", "config", "models"},
    "launch": {"records", "config", "planning", "supervision"},
    "audit": {"records", "config", "data", "grading", "metrics", "rollout.replay"},
    "evaluation": {"records", "config", "data", "grading", "metrics", "rollout", "inputs"},
    "evaluation.standalone": {"config", "inputs", "metrics", "policy", "rollout", "parallel"},
    "prepare": {"records", "config", "data", "grading", "metrics.files"},
    "inputs": {"records", "config", "data", "grading"},
    "convert": {"records", "config", "compat", "models", "parallel", "checkpoint"},
}
# The two programs and what the loop is made of; nothing imports train.
UNRESTRICTED = {"train", "evaluate", "run", "resume", "stages", "keeping", "policy", "serve", "ahead", "server_sync", "drawing", "noise_floor"}
EVERYWHERE = {"durable"}  # writes files and knows nothing of what is in them
VLLM_ROOMS = {"rollout", "compat"}
NOT_FROM_THE_PACKAGE = {"examples", "tools", "tests", "benchmarks"}


def _name(path: Path) -> str:
    """`algorithm.gate` for megatron_antisd/algorithm/gate.py; a folder's __init__ has the folder's name; "" is the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(name: str) -> str:
    return name.split(".")[0]


def _imports(path: Path) -> Iterator[str]:
    """Every imported module, dotted and absolute; `from a import b` gives a.b, since b may be a module."""
    package = ["megatron_antisd", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *((node.module or "").split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def _ours(path: Path) -> set[str]:
    """The modules of the package that `path` imports, without the package's name."""
    known = {_name(p) for p in MODULES}
    found = set()
    for name in _imports(path):
        if name.split(".")[0] != "megatron_antisd":
            continue
        inner = name.removeprefix("megatron_antisd").removeprefix(".")
        while inner and inner not in known:  # `from megatron_antisd.records import Rollout` -> records
            inner = inner.rpartition(".")[0]
        if inner:
            found.add(inner)
    return found


def test_rooms_import_only_what_they_may() -> None:
    wrong = []
    for path in MODULES:
        name = _name(path)
        if not name or _room(name) in UNRESTRICTED:
            continue
        assert _room(name) in MAY_IMPORT, f"{name}: a new room; say in MAY_IMPORT what it may import"
        allowed = EVERYWHERE | MAY_IMPORT.get(name, MAY_IMPORT[_room(name)])
        for target in _ours(path):
            if _room(target) != _room(name) and not {target, _room(target)} & allowed:
                wrong.append(f"{name} imports {target}; it may import {sorted(allowed) or 'nothing of the package'}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_the_training_loop() -> None:
    assert not [_name(path) for path in MODULES if "train" in _ours(path)]


def test_no_import_cycles() -> None:
    graph = {_name(path): _ours(path) - {_name(path)} for path in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_only_rollout_and_compat_import_vllm() -> None:
    wrong = [_name(path) for path in MODULES
             if _room(_name(path)) not in VLLM_ROOMS and any(name.split(".")[0] == "vllm" for name in _imports(path))]
    assert not wrong, f"these import vLLM, which may be absent: {wrong}"


def test_package_imports_nothing_from_outside_itself() -> None:
    wrong = [f"{_name(path)}: {name}" for path in MODULES for name in _imports(path) if name.split(".")[0] in NOT_FROM_THE_PACKAGE]
    assert not wrong, wrong


def test_algorithm_knows_torch_only_and_no_ranks() -> None:
    allowed = {"torch", "megatron_antisd", "__future__", *sys.stdlib_module_names}
    for path in [PACKAGE / "records.py", *sorted((PACKAGE / "algorithm").rglob("*.py"))]:
        foreign = {name for name in _imports(path) if name.split(".")[0] not in allowed or name.startswith("torch.distributed")}
        assert not foreign, f"{_name(path)} imports {foreign}"
        assert "torch.distributed" not in path.read_text(), f"{_name(path)} speaks of torch.distributed"


def test_algorithm_imports_with_torch_alone() -> None:
    program = (
        "import sys\n"
        "for name in ('megatron', 'vllm', 'transformers', 'pydantic', 'yaml', 'math_verify', 'rich'): sys.modules[name] = None\n"
        "import megatron_antisd.algorithm as algorithm; algorithm.phi, algorithm.EntropyGate\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_is_small_documented_and_typed(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{_where(path, 1)}: split this file"
    assert path.name not in ("utils.py", "helpers.py", "misc.py"), f"{_where(path, 1)}: name it for what it holds"
    if text.strip() and path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(text)), f"{_where(path, 1)}: a module says on top what it is for"
    for function in _functions(path):
        _check_length(path, function)
        if not function.name.startswith("_") or function.name == "__init__":
            _check_annotations(path, function)


def _check_length(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    length = function.end_lineno - function.lineno + 1 - docstring
    assert length <= MAX_FUNCTION_LINES, f"{_where(path, function.lineno)}: {function.name} has {length} lines"
    if length > WARN_FUNCTION_LINES:
        warnings.warn(f"{_where(path, function.lineno)}: {function.name} has {length} lines", stacklevel=2)


def _check_annotations(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *([a.vararg] if a.vararg else []), *([a.kwarg] if a.kwarg else [])]
    bare = [arg.arg for arg in given if arg.annotation is None and arg.arg not in ("self", "cls")]
    if function.returns is None:
        bare.append("return")
    assert not bare, f"{_where(path, function.lineno)}: {function.name} lacks types for {', '.join(bare)}"


def test_training_loop_fits_on_two_pages() -> None:
    loop = PACKAGE / "train.py"
    if not loop.is_file():
        pytest.skip("no train.py")
    assert len(loop.read_text().splitlines()) <= MAX_LOOP_LINES


def test_lint() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "--output-format=concise", "."],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def _project_files() -> list[Path]:
    """Tracked files and new ones that are not ignored."""
    done = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
                          cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_paths_of_one_machine() -> None:
    # Written in pieces, so that this file does not find itself.
    homes = "|".join(["work", "root", "home", "Users", "mnt", "scratch", "private"])
    machine = re.compile(rf"(?<![\w.$}}~-])/(?:{homes})/\w")
    beside = "shared" + "/data"  # .ci/run alone may know what lies beside the checkout
    wrong = []
    for path in _project_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # a picture, say
        for number, line in enumerate(lines, start=1):
            if machine.search(line) or (beside in line and path != ROOT / ".ci/run"):
                wrong.append(f"{_where(path, number)}: {line.strip()[:120]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["tests/run.sh", "tools/setup_env.sh", ".ci/run"])
def test_command_is_executable(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111, f"chmod +x {name}"


@pytest.mark.parametrize("name", ["tests/run.sh", "tools/setup_env.sh", ".ci/run", "examples/quickstart/run.sh", "examples/quickstart/compare.sh",
                                  "examples/dapo/run.sh"])
def test_command_parses(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
