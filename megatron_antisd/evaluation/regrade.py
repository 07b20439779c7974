"""Grade stored samples again, without generating anything: after a grader or a reference answer changed."""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_antisd.config import BenchmarkConfig, ConfigError, RunConfig, load_config
from megatron_antisd.data import ProblemDataError, load_problems
from megatron_antisd.data.problems import fingerprint
from megatron_antisd.durable import write_whole
from megatron_antisd.evaluation.statistics import summarise
from megatron_antisd.evaluation.store import StoreError, by_problem, graded_sample, read_samples, write_samples
from megatron_antisd.evaluation.votes import final_vote
from megatron_antisd.grading import GradingError, GradingPool
from megatron_antisd.grading.building import build_pool
from megatron_antisd.grading.groups import feedback_of, task_of
from megatron_antisd.grading.verdict import GradingTask, Verdict
from megatron_antisd.metrics import MetricsError, read_rows
from megatron_antisd.metrics.files import CONFIG, EVALUATIONS, METRICS, json_line
from megatron_antisd.records import Problem

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Regraded:
    """What became of one benchmark's samples at one step."""

    path: Path
    step: int
    changed: int
    """Samples whose reward is another one now."""
    before: dict[str, float]
    after: dict[str, float]
    header: dict[str, Any]
    rows: list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m megatron_antisd.evaluation.regrade RUN`; exit status 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m megatron_antisd.evaluation.regrade", description="Grade an evaluation's stored samples again.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory with evaluations/ and config.yaml: a run's, or its evaluation/")
    parser.add_argument("--config", type=Path, help="another configuration than RUN/config.yaml (its benchmarks' files and its grading are used)")
    parser.add_argument("--benchmark", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--write", action="store_true", help="replace samples and metrics (the old files are kept as *.before-regrading-N)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        config = load_config(options.config or options.run / CONFIG)
        results = regrade(options.run, config, options.benchmark, write=options.write)
    except (ConfigError, ProblemDataError, GradingError, StoreError, MetricsError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for result in results:
        key = next(key for key in result.after if "/avg@" in key)
        print(f"{result.path}: {result.changed} of {len(result.rows)} rewards changed, {key} {result.before[key]:.4f} -> {result.after[key]:.4f}")
    if not options.write:
        print("nothing was written; --write replaces the samples and the metrics")
    return 0


def regrade(run: Path, config: RunConfig, only: Sequence[str] = (), *, write: bool) -> list[Regraded]:
    """Every stored benchmark of every step, or those of `only`; evaluations that are not finished are left out with a warning. All is graded
    before anything is written. Raises StoreError where samples and problems do not belong together, GradingError where answers ran out
    of time or broke the grader, which is no verdict on them."""
    by_name = {benchmark.name: benchmark for benchmark in config.evaluation.benchmarks}
    unknown = sorted({*only} - {*by_name})
    if unknown:
        raise ConfigError(f"--benchmark {unknown[0]}: the configuration has {sorted(by_name)}")
    paths = [path for path in sorted(run.glob(f"{EVALUATIONS}/step_*/*.jsonl")) if path.stem in by_name and (not only or path.stem in only)]
    if not paths:
        raise StoreError(f"{run} holds no samples of {sorted(only or by_name)} ({EVALUATIONS}/step_*/<benchmark>.jsonl); evaluate it first")
    if write and not (run / METRICS).is_file():
        raise StoreError(f"{run} has no {METRICS} in which the figures could be replaced")
    problems = {name: load_problems([benchmark.path]) for name, benchmark in by_name.items() if any(path.stem == name for path in paths)}
    results = []
    with build_pool(config.grading, [problem for each in problems.values() for problem in each]) as pool:
        for path in paths:
            header, rows = read_samples(path)
            if len(rows) < len(problems[path.stem]) * header["samples"]:
                _log.warning("%s is left out: it holds %d of %d samples, the evaluation is not finished", path, len(rows),
                             len(problems[path.stem]) * header["samples"])
                continue
            tasks = _tasks(path, by_name[path.stem], problems[path.stem], rows)
            results.append(_regraded(path, config, header, rows, _verdicts(path, pool, tasks), problems[path.stem]))
    if write:
        for result in results:
            _keep(result.path)
            write_samples(result.path, result.header, result.rows)
        _rewrite_metrics(run / METRICS, results)
    return results


def _verdicts(path: Path, pool: GradingPool, tasks: Sequence[GradingTask]) -> tuple[Verdict, ...]:
    report = pool.grade_many(tasks)
    if report.timeouts or report.crashes:
        raise GradingError(f"{path}: {report.timeouts} answers ran out of time and {report.crashes} broke the grader; nothing was written. On a busy "
                           "machine raise grading.timeout_seconds in the configuration given with --config")
    return report.verdicts


def _tasks(path: Path, benchmark: BenchmarkConfig, problems: Sequence[Problem], rows: Sequence[Mapping[str, Any]]) -> list[GradingTask]:
    by_id = {problem.id: problem for problem in problems}
    strangers = sorted({row["problem_id"] for row in rows} - by_id.keys())
    if strangers:
        raise StoreError(f"{path} holds samples of problem {strangers[0]!r}, which is not in {benchmark.path}; use the file they were drawn from")
    return [task_of(row["text"], by_id[row["problem_id"]]) for row in rows]


def _regraded(path: Path, config: RunConfig, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict],
              problems: Sequence[Problem]) -> Regraded:
    tests = {problem.id: problem.tests for problem in problems}
    after = [{**row, "reward": verdict.reward, "answer": final_vote(row["text"], tests[row["problem_id"]]),
              "feedback": feedback_of(verdict, config.privileged)} for row, verdict in zip(rows, verdicts, strict=True)]
    return Regraded(path=path, step=header["step"], changed=sum(old["reward"] != new["reward"] for old, new in zip(rows, after, strict=True)),
                    before=_summary(header, rows), rows=after,
                    after=_summary(header, after) | {f"eval/{header['benchmark']}/{key}": 0 for key in ("grader_timeouts", "grader_crashes")},
                    header={**header, "problems": fingerprint(problems), "grader": config.grading.function or "built-in"})


def _keep(path: Path) -> None:
    """A copy of a file that is about to be replaced, under a name that is free: the first one is the original."""
    number = 1
    while (old := path.with_name(f"{path.name}.before-regrading-{number}")).exists():
        number += 1
    shutil.copy2(path, old)


def _summary(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return summarise(header["benchmark"], [[graded_sample(row) for row in samples] for samples in by_problem(rows).values()])


def _rewrite_metrics(path: Path, results: Sequence[Regraded]) -> None:
    """The evaluation rows of metrics.jsonl with the new figures; the mirrors (TensorBoard, W&B) keep what they were told."""
    new: dict[int, dict[str, float]] = {}
    for result in results:
        new.setdefault(result.step, {}).update(result.after)
    _keep(path)
    lines = []
    for row in read_rows(path):
        if any(key.startswith("eval/") for key in row) and row["step"] in new:
            benchmarks = {key.split("/")[1] for key in new[row["step"]]}
            row = {**{key: value for key, value in row.items() if key.split("/")[1:2] not in [[b] for b in benchmarks]}, **new[row["step"]]}
        lines.append(json_line(row))
    write_whole(path, lines)


if __name__ == "__main__":
    sys.exit(main())
