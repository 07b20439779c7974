"""The command that fetches and prepares data; `tools/prepare_data.py` calls it."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_antisd.config import GradingConfig
from megatron_antisd.config.benchmarks import BENCHMARKS, DIRECTORY, PAPER, TRAINING_SETS
from megatron_antisd.data import load_problems
from megatron_antisd.grading.sandbox import SandboxError, SandboxSettings
from megatron_antisd.grading.sandbox_choice import choose_sandbox
from megatron_antisd.prepare.decontamination import COVERAGE, NGRAM, Decontamination
from megatron_antisd.prepare.preparation import Prepared, prepare_rows, verify, write_prepared
from megatron_antisd.prepare.sources import PrepareError, open_source

REGISTERED = {**BENCHMARKS, **TRAINING_SETS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 with one line on stderr."""
    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    names = [*options.names, *(PAPER if options.paper else ())]
    try:
        if options.verify:
            if not options.names or options.paper:
                raise PrepareError("--verify: name the files to check, such as data/aime2024.jsonl")
            for path in options.names:
                manifest = verify(Path(path))
                print(f"{path}: {manifest['problems']} problems, as prepared from {manifest['source']['name']}")
            return 0
        if not names:
            raise PrepareError(f"nothing to prepare: name data sets ({', '.join(REGISTERED)}), or --paper for the paper's seven benchmarks")
        if len(names) > 1 and (options.source or options.output):
            raise PrepareError(f"--from and --output are of one data set, but {len(names)} were named: {', '.join(names)}")
        for name in names:
            _prepare(name, options)
    except (SandboxError, OSError, ValueError) as error:  # PrepareError and ProblemDataError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/prepare_data.py", description="Published data sets -> JSON lines of this project, with a manifest of checksums and counts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(REGISTERED)}; any other name needs --from")
    parser.add_argument("--paper", action="store_true", help="the paper's seven benchmarks")
    parser.add_argument("--from", dest="source", metavar="SOURCE", help="a local .jsonl, .jsonl.gz, .json or .parquet file, or a name on "
                        "Hugging Face (default: the registered one)")
    parser.add_argument("--split", help="of a data set on Hugging Face (default: the registered one, or train)")
    parser.add_argument("--subset", help="of a data set on Hugging Face that has several")
    parser.add_argument("--output", type=Path, help=f"file to write (default: {DIRECTORY}/NAME.jsonl)")
    parser.add_argument("--column", action="append", default=[], metavar="FIELD=COLUMN",
                        help="the column of problem, answer, solution or id, where its name is not known here; may be repeated")
    parser.add_argument("--decontaminate", nargs="+", default=[], metavar="NAME_OR_FILE", help="benchmarks whose problems are dropped: prepared "
                        f"ones by name ({DIRECTORY}/NAME.jsonl), or files")
    parser.add_argument("--ngram", type=int, default=NGRAM, help="words of the sequences that are compared (default: %(default)s)")
    parser.add_argument("--coverage", type=float, default=COVERAGE,
                        help="share of a benchmark problem's sequences that makes a repetition (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="prepare nothing: check that the files named are what their manifests say")
    return parser


def _prepare(name: str, options: argparse.Namespace) -> None:
    registered = REGISTERED.get(name)
    if registered is None and options.source is None:
        raise PrepareError(f"{name!r} is not registered ({', '.join(REGISTERED)}); say where it is with --from")
    where = options.source or registered.dataset
    subset = options.subset or (registered.subset if registered and not options.source else None)
    split = options.split or (registered.split if registered else "train")
    output = options.output or Path(DIRECTORY) / f"{name}.jsonl"
    against = _benchmarks(options.decontaminate)
    decontamination = None
    if against:
        decontamination = Decontamination({key: load_problems([path]) for key, path in against.items()}, ngram=options.ngram,
                                          coverage=options.coverage)
    if output.suffix != ".jsonl":
        raise PrepareError(f"--output {output}: JSON lines are written, so the name must end in .jsonl")
    source, rows = open_source(where, subset, split)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task(f"{name}: reading")
        prepared = prepare_rows(rows, name=name, columns=_columns(options.column), decontamination=decontamination, sandbox=_sandbox(),
                                progress=lambda count: bar.update(task, description=f"{name}: {count} rows"))
    used: dict[str, Any] = {"columns": _columns(options.column), "ngram": options.ngram, "coverage": options.coverage}
    manifest = write_prepared(prepared, output, source=source, options=used, against=against)
    _report(name, output, prepared, manifest)
    if name in BENCHMARKS and len(prepared.problems) != registered.problems:
        print(f"  note: the published file held {registered.problems} problems when this name was registered")


def _report(name: str, output: Path, prepared: Prepared, manifest: dict[str, Any]) -> None:
    print(f"{name}: {prepared.rows} rows -> {len(prepared.problems)} problems in {output} (SHA-256 {manifest['sha256'][:16]}...)")
    for reason, count in prepared.dropped.most_common():
        print(f"  dropped {count}: {reason} (such as {prepared.examples[reason][0]})")


def _columns(given: Sequence[str]) -> dict[str, str]:
    columns = {}
    for text in given:
        field, separator, column = text.partition("=")
        if not separator or field not in ("problem", "answer", "solution", "id"):
            raise PrepareError(f"--column {text}: expected FIELD=COLUMN with FIELD one of problem, answer, solution, id")
        columns[field] = column
    return columns


def _benchmarks(given: Sequence[str]) -> dict[str, Path]:
    """Name -> file. Benchmarks are counted by name, so two files of one name cannot be told apart."""
    found: dict[str, Path] = {}
    for text in given:
        path = _benchmark_path(text)
        if path.stem in found:
            raise PrepareError(f"--decontaminate: {found[path.stem]} and {path} are both called {path.stem!r}; rename one")
        found[path.stem] = path
    return found


def _benchmark_path(given: str) -> Path:
    path = Path(given) if given not in REGISTERED else Path(DIRECTORY) / f"{given}.jsonl"
    if not path.is_file():
        raise PrepareError(f"--decontaminate {given}: no file at {path}; prepare it first, or name a file")
    return path


def _sandbox() -> Any:
    @functools.cache
    def choose() -> SandboxSettings:
        return choose_sandbox(GradingConfig())

    return choose
