"""The u-lens: one HTML page that shows scored rollouts token by token. It needs no network and opens from a file.

The page's texts come from models and data sets, so none of them is ever read as HTML: they travel compressed, the script puts them into
text nodes alone, and the page's own security policy forbids every script and style but its two and every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_antisd.metrics import MetricsError
from megatron_antisd.metrics.files import ROLLOUTS
from megatron_antisd.metrics.scored_rollouts import read_scored, scored_files
from megatron_antisd.reporting.u_lens_data import QUANTUM, Packer, packed, packed_text
from megatron_antisd.reporting.u_lens_statistics import MINIMUM_COUNT, colour_range, extreme_tokens, heat_map, over_steps

PAGE = "u_lens.html"
PARTS = Path(__file__).parent / "u_lens_page"
SCRIPTS = ("decode.js", "text.js", "tokens.js", "list.js", "rollout.js", "charts.js", "heat.js", "main.js")


def write_u_lens(
    sources: Sequence[Path], output: Path | None = None, *, steps: Sequence[int] | None = None, minimum_count: int = MINIMUM_COUNT
) -> Path:
    """Make the page of a run directory or of some `step_*.jsonl` files, and return its path (default: u_lens.html in or beside the first).

    `steps`: only those. `minimum_count`: occurrences a token needs to stand in the tables. Raises FileNotFoundError where there is no file
    of scored rollouts, MetricsError for one that cannot be read, ValueError for files that do not belong on one page.
    """
    files = _chosen(_found(sources), steps)
    packer, method = _packed_files(files)
    if not packer.rollouts:
        raise MetricsError(f"{_listed(files)}: no rollouts in there; a run writes some where logging.rollout_groups is above 0")
    first = sources[0]
    output = output or (first if first.is_dir() else first.parent) / PAGE
    name = (first.parent if first.name == ROLLOUTS else first).resolve().name
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.write_text(_page(packer, method, name, minimum_count), encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return output


def _found(sources: Sequence[Path]) -> list[Path]:
    """The files that the sources mean, in their order."""
    files = []
    for source in sources:
        if not source.is_dir():
            files.append(source)
            continue
        inside = sorted(source.glob("step_*.jsonl")) or scored_files(source)
        if not inside:
            raise FileNotFoundError(f"{source} has no {ROLLOUTS}/step_*.jsonl; a run writes scored rollouts at evaluation steps when "
                                    "logging.rollout_groups is above 0")
        files += inside
    return list(dict.fromkeys(files))


def _chosen(files: list[Path], steps: Sequence[int] | None) -> list[Path]:
    """By the step in the file's name; a file of another name is read to know."""
    if steps is None:
        return files
    numbers = {path: _step_of(path) for path in files}
    missing = sorted(set(steps) - set(numbers.values()))
    if missing:
        raise ValueError(f"no scored rollouts of step {', '.join(map(str, missing))}; there are steps {sorted(numbers.values())}")
    return [path for path in files if numbers[path] in steps]


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step_")
    return int(digits) if digits.isdecimal() else read_scored(path).step


def _packed_files(files: Sequence[Path]) -> tuple[Packer, str]:
    packer, methods, by_step = Packer(), {}, {}
    for path in files:
        scored = read_scored(path)
        methods[scored.method] = path
        if len(methods) > 1:
            each = ", ".join(f"{method} in {where}" for method, where in methods.items())
            raise ValueError(f"a page shows one method, got {each}; make one page for each")
        if scored.step in by_step:
            raise ValueError(f"step {scored.step} stands in {by_step[scored.step]} and in {path}; a page shows one run, make one page for each")
        by_step[scored.step] = path
        packer.add(path, scored)
    return packer, next(iter(methods))


def _page(packer: Packer, method: str, name: str, minimum_count: int) -> str:
    values, steps = packer.values(), sorted(packer.steps)
    chunks = packer.chunks

    def store(array: object) -> int:
        chunks.append(packed(array))
        return len(chunks) - 1

    about = {
        "method": method, "steps": steps, "quantum": QUANTUM, "range": colour_range(values), "tokens": packer.tokens(),
        "problems": packer.problems, "prompts": packer.prompts, "rollouts": packer.rollouts, "scored": len(values.u),
        "heat": heat_map(values, steps, store), "overSteps": over_steps(values, steps),
        "extremes": extreme_tokens(values, steps, minimum_count),
    }  # fmt: skip
    data = json.dumps({"about": packed_text(about), "chunks": chunks})
    style = (PARTS / "style.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "\n".join((PARTS / part).read_text(encoding="utf-8") for part in SCRIPTS)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(PARTS), autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html.jinja").render(
        name=name, method=method, style=style, script=script, data=data, style_hash=_hash(style),
        script_hash=_hash(script),
    )  # fmt: skip


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _listed(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
