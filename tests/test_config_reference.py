"""docs/configuration_keys.md is what the schema says, and says all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field

from megatron_antisd.config import BenchmarkConfig, RunConfig, Section, known_keys
from megatron_antisd.config.reference import reference_markdown

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/configuration_keys.md"
ROW = re.compile(r"^\| `([\w.\[\]]+)` \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)


def test_page_is_the_tools_output() -> None:
    done = subprocess.run([sys.executable, "tools/config_reference.py"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert PAGE.read_text() == done.stdout, "run: python tools/config_reference.py > docs/configuration_keys.md"


def test_every_key_stands_once() -> None:
    keys = [row[0] for row in ROW.findall(PAGE.read_text())]
    inner = [f"evaluation.benchmarks[].{name}" for name in BenchmarkConfig.model_fields]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {*known_keys(), *inner}


def test_defaults_are_valid_yaml_and_the_schemas() -> None:
    """Written into a configuration, the page's defaults give the defaults."""
    raw: dict[str, Any] = {}
    for key, _, default, _ in ROW.findall(PAGE.read_text().replace("\\|", "|")):
        *sections, leaf = key.strip("`").split(".")
        if default != "required" and "[]" not in key:
            node = raw
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = yaml.safe_load(default.strip("`"))
    required = {"model": {"path": "m"}, "data": {"train": ["t"]}}
    for section, values in required.items():
        raw[section] = {**raw[section], **values}
    assert RunConfig.model_validate(raw) == RunConfig.model_validate(required)


class Inner(Section):
    mode: Literal["a", "b"] = "a"
    """One | two
    <lines>, `<code>`."""
    share: float | None = Field(None, gt=0, le=1)
    names: tuple[str, ...] = Field(min_length=1)


class Outer(Section):
    inner: Inner


def test_types_bounds_and_meaning() -> None:
    assert reference_markdown(Outer).split("|---|---|---|---|\n")[1].splitlines() == [
        '| `inner.mode` | `a` or `b` | `"a"` | One \\| two &lt;lines>, `<code>`. |',
        "| `inner.share` | float or null, > 0, <= 1 | `null` |  |",
        "| `inner.names` | list of text, at least 1 | required |  |",
    ]


class Odd(Section):
    when: bytes = b""


class OddOuter(Section):
    odd: Odd = Odd()


def test_unknown_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="no name for the type"):
        reference_markdown(OddOuter)
