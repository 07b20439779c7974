"""The algorithm works with torch alone: in a fresh interpreter where everything else of the project's stack cannot be imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import megatron_antisd.algorithm as algorithm

ROOM = Path(algorithm.__file__).parent
PROJECT = ROOM.parents[1]

SCRIPT = """
import importlib.abc, sys

FORBIDDEN = ("megatron", "vllm", "transformers", "pydantic", "yaml", "safetensors", "ray", "transformer_engine")

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is forbidden here")

sys.meta_path.insert(0, Refuse())
import torch
import megatron_antisd.algorithm as algorithm

assert algorithm.phi(torch.zeros(1)).item() == 0.0
assert algorithm.EntropyGate(warmup_steps=1).update(1.0).lambda_ == 0.0
loaded = sorted(name for name in sys.modules if name.split(".")[0] in FORBIDDEN)
assert not loaded, loaded
ours = {name for name in sys.modules if name.split(".")[0] == "megatron_antisd"}
allowed = ("megatron_antisd", "megatron_antisd.records")
beyond = sorted(name for name in ours if name not in allowed and not name.startswith("megatron_antisd.algorithm"))
assert not beyond, beyond
assert not torch.distributed.is_initialized()
print("alone")
"""


def imported_modules(tree: ast.Module) -> list[str]:
    plain = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return plain + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_import_with_torch_alone() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "alone"


def test_source_imports_torch_and_the_standard_library_only() -> None:
    allowed = {"torch", *sys.stdlib_module_names}
    for file in sorted(ROOM.glob("*.py")):
        for name in imported_modules(ast.parse(file.read_text())):
            inside = name == "megatron_antisd.records" or name.startswith("megatron_antisd.algorithm")
            assert inside or name.split(".")[0] in allowed, f"{file.name} imports {name}"
            assert not name.startswith("torch.distributed"), f"{file.name} imports {name}"


def test_every_exported_name_exists_and_the_page_stays_a_page() -> None:
    assert all(hasattr(algorithm, name) for name in algorithm.__all__)
    source = (ROOM / "advantage.py").read_text()
    text = {line for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node)
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in text]
    assert len(code) <= 100
