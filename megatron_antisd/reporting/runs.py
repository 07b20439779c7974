"""A finished or running run directory, read for plots and tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_antisd.config import AlgorithmConfig, ConfigError, GateConfig, RunConfig, load_config
from megatron_antisd.metrics import MetricsError, read_metrics, read_rows
from megatron_antisd.metrics.files import CONFIG, METRICS, SAMPLES, TOKEN_U


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run directory."""

    directory: Path
    config: RunConfig
    rows: tuple[dict[str, Any], ...]
    """One row a step, training and evaluation merged, rising in `step`."""
    samples: tuple[dict[str, Any], ...] = ()
    """Rows of samples.jsonl; empty where the run wrote none."""
    token_u: tuple[dict[str, Any], ...] = ()
    """Rows of token_u.jsonl; empty where the run wrote none."""

    @property
    def training(self) -> list[dict[str, Any]]:
        """The rows that hold a policy update."""
        return [row for row in self.rows if "reward_mean" in row]

    @property
    def benchmarks(self) -> list[str]:
        """The `eval/<benchmark>/avg@k` keys that occur, sorted."""
        return sorted({key for row in self.rows for key in row if is_average(key)})

    @property
    def method(self) -> str:
        return method_label(self.config)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of every row that has `key`; NaN where it is null, so that a curve shows a gap."""
        pairs = [(row["step"], math.nan if row[key] is None else float(row[key])) for row in self.rows if key in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def accuracy(self, benchmark: str | None = None) -> dict[int, float]:
        """Step -> accuracy: of one benchmark (`search`), or the mean over all (method: how checkpoints are compared).

        A step at which one of the benchmarks has no value has no accuracy: a mean over fewer would not be comparable.
        """
        keys = [key for key in self.benchmarks if benchmark is None or key.split("/")[1] == benchmark]
        if benchmark is not None and not keys:
            names = sorted({key.split("/")[1] for key in self.benchmarks})
            raise MetricsError(f"{self.directory}: no evaluation of benchmark {benchmark!r}; it has {names}")
        complete = [row for row in self.rows if keys and all(row.get(key) is not None for key in keys)]
        return {row["step"]: sum(row[key] for key in keys) / len(keys) for row in complete}


    def at(self, step: int) -> dict[str, Any]:
        """The row of a step."""
        return next(row for row in self.rows if row["step"] == step)

    def pass_at(self, benchmark: str, step: int) -> dict[int, tuple[float, float | None, float | None]]:
        """k -> (pass@k, low, high) at a step, rising in k; low and high are None where the evaluation gave no interval."""
        row, start = self.at(step), f"eval/{benchmark}/pass"
        found = {int(key.partition("@")[2]): value for key, value in row.items() if key.startswith(f"{start}@") and value is not None}
        return {k: (found[k], row.get(f"{start}_low@{k}"), row.get(f"{start}_high@{k}")) for k in sorted(found)}


def load_run(directory: Path | str) -> RunData:
    """Read config.yaml and metrics.jsonl (required), samples.jsonl and token_u.jsonl (where they are).

    Raises FileNotFoundError for a directory that holds no run, ConfigError or MetricsError for files that cannot be read."""
    directory = Path(directory)
    for name in (CONFIG, METRICS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}, so it is no run directory; give the folder a run wrote, e.g. runs/quickstart"
            )
    rows = read_metrics(directory / METRICS)
    if not rows:
        raise MetricsError(f"{directory / METRICS} has no rows yet; the run has not finished its first step")
    try:
        config = load_config(directory / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"{directory / CONFIG}: {error}") from error
    return RunData(
        directory=directory,
        config=config,
        rows=tuple(rows),
        samples=_optional_rows(directory / SAMPLES),
        token_u=_optional_rows(directory / TOKEN_U),
    )


def is_average(key: str) -> bool:
    return key.startswith("eval/") and key.rsplit("/", 1)[-1].startswith("avg@")


def method_label(config: RunConfig, ignored: frozenset[str] = frozenset()) -> str:
    """The method and, in brackets, what of the algorithm and the gate differs from its default: `antisd (gate.mode=always)`.

    Settings that do nothing (a gate without a teacher) and those in `ignored` are left out."""
    settings = {key: value for key, value in _settings(config).items() if value != _DEFAULTS[key] and key not in ignored}
    if not config.needs_teacher and config.algorithm.method == "grpo":
        settings = {key: value for key, value in settings.items() if key not in TEACHER_SETTINGS and not key.startswith("gate.")}
    parts = ["continual"] * bool(config.checkpoint.continual_from) + [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    ]
    return config.algorithm.method + (f" ({', '.join(parts)})" if parts else "")


def method_labels(runs: Sequence[RunData]) -> list[str]:
    """A label for each run. Where several methods are compared, a setting that all runs share tells none apart and is left out."""
    shared: frozenset[str] = frozenset()
    if len({run.config.algorithm.method for run in runs}) > 1:
        every = [_settings(run.config) for run in runs]
        shared = frozenset(key for key in _DEFAULTS if all(settings[key] == every[0][key] for settings in every))
    return [method_label(run.config, shared) for run in runs]


def _settings(config: RunConfig) -> dict[str, Any]:
    return _section_settings(config.algorithm, config.gate)


def _section_settings(algorithm: AlgorithmConfig, gate: GateConfig) -> dict[str, Any]:
    settings = {key: value for key, value in algorithm.model_dump().items() if key != "method"}
    return settings | {f"gate.{key}": value for key, value in gate.model_dump().items()}


_DEFAULTS = _section_settings(AlgorithmConfig(), GateConfig())
TEACHER_SETTINGS = ("lambda_max", "compose")


def group_runs(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Label -> the runs that are repetitions of each other: the same method on other seeds or base models.

    Runs of one method with the same base and seed differ in something else, so each stands for itself under its name.
    """
    by_method: dict[str, list[RunData]] = {}
    for label, run in zip(method_labels(runs), runs, strict=True):
        by_method.setdefault(label, []).append(run)
    groups: dict[str, list[RunData]] = {}
    for method, members in by_method.items():
        identities = {(run.config.model.path, run.config.run.seed) for run in members}
        if len(identities) == len(members):
            groups[method] = members
            continue
        names = distinct_names([str(run.directory) for run in members])
        for name, run in zip(names, members, strict=True):
            groups[f"{method}: {name}"] = [run]
    return groups


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: `runs/a/hf`, `runs/b/hf` -> `a/hf`, `b/hf`."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def gate_intervals(run: RunData) -> list[tuple[str, int, int]]:
    """(state, first step, last step) in order, state one of `warm-up`, `open`, `closed`. Empty for a run without a gate."""
    states = [(row["step"], _gate_state(row)) for row in run.training]
    known = [(step, state) for step, state in states if state is not None]
    intervals: list[tuple[str, int, int]] = []
    for state, members in itertools.groupby(known, key=lambda item: item[1]):
        steps = [step for step, _ in members]
        intervals.append((state, steps[0], steps[-1]))
    return intervals


def _gate_state(row: dict[str, Any]) -> str | None:
    """A calibrated gate has thresholds; one that only warms up is reported closed without them."""
    if row["gate_open"] is None:
        return None
    if row["gate_open"]:
        return "open"
    return "warm-up" if row["gate_warm"] is None else "closed"


def _optional_rows(path: Path) -> tuple[dict[str, Any], ...]:
    return tuple(read_rows(path)) if path.is_file() else ()
