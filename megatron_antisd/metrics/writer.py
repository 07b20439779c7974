"""The writer of a run's metrics; the package's docstring states the order of its calls."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_antisd.config import ConfigError, LoggingConfig
from megatron_antisd.metrics.console import ConsoleLog, Value, is_accuracy
from megatron_antisd.metrics.files import (
    EVALUATIONS,
    METRICS,
    ROLLOUTS,
    ROUTING,
    SAMPLES,
    TENSORBOARD,
    TOKEN_U,
    WANDB_ID,
    JsonLines,
    MetricsError,
    move_aside,
    read_rows,
    remove_from_step,
    remove_step,
    remove_steps,
)
from megatron_antisd.metrics.scored_rollouts import write_scored
from megatron_antisd.metrics.stages import STAGES
from megatron_antisd.records import ScoredGroup

STEP_KEYS = (
    "step", "reward_mean", "reward_completed_mean", "response_length_mean", "truncation_rate",
    "student_entropy_mean", "teacher_entropy_median", "gate_open", "gate_warm", "gate_down", "lambda",
    "u_mean", "u_negative_share", "phi_bound_share", "loss", "grad_norm", "clip_fraction",
    "mismatch_kl", "mismatch_max", "tokens", "tokens_per_second", "seconds_total",
    *(f"seconds_{stage}" for stage in STAGES),
)  # fmt: skip
"""The keys of every training row. `step` is the writer's; all others must be given, None where the value does not exist
(the teacher's in a run without one, the loss of a skipped update). More keys may follow."""

_log = logging.getLogger(__name__)
STEP_FILES = (METRICS, SAMPLES, TOKEN_U, ROUTING)
SAMPLE_KEYS = ("problem_id", "prompt", "response", "reward", "truncated")
TOKEN_U_KEYS = ("kind", "mean_u", "count")


class MetricsWriter:
    """Writes the files of one run directory. Use as a context manager, or call `close()`.

    `resume_step` is the first step that will run again: rows from it on are removed from the files. None starts a new run: files of an earlier
    one in the same directory are moved aside, not deleted. `evaluation_alone`: nothing but evaluations is written, and one of a step
    replaces that step's earlier one. `patient`: a full disk does not raise OSError; rows wait in memory until they can be written, and files that
    are written whole (`rollouts/`, TensorBoard's) are left out with an error in the log.
    """

    def __init__(
        self, directory: Path, *, config: LoggingConfig, total_steps: int, resume_step: int | None, run_name: str, is_writer: bool,
        evaluation_alone: bool = False, patient: bool = False,
    ) -> None:
        self._is_writer = is_writer
        self.evaluations: dict[int, dict[str, Value]] = {}
        """Step -> the row of its evaluation; empty on ranks that do not write."""
        if not is_writer:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._evaluation_alone, self._patient, self._directory = evaluation_alone, patient, directory
        self._lines = {name: JsonLines(directory / name, patient=patient) for name in STEP_FILES}
        self._last_step, self._last_evaluation, self._closed = 0, -1, False
        if resume_step is not None:
            self._cut_back(resume_step)
        elif not evaluation_alone:
            move_aside(directory)
        self._total_steps = total_steps
        self._tensorboard = _open_tensorboard(directory / TENSORBOARD, resume_step) if config.tensorboard else None
        self._wandb = _open_wandb(directory, config.wandb_project, run_name) if config.wandb_project else None
        self._console = ConsoleLog(run_name, total_steps, self._last_step, show_bar=config.progress)

    @property
    def wandb_id(self) -> str | None:
        return self._wandb.id if self._is_writer and self._wandb is not None else None

    def rewind(self, step: int) -> None:
        """Forget `step` and what follows: the run went back before it."""
        if self._is_writer:
            self._cut_back(step)

    def _cut_back(self, step: int) -> None:
        for name in STEP_FILES:
            self._lines[name].forget(step)
            remove_from_step(self._directory / name, step)
        for name in (ROLLOUTS, EVALUATIONS):
            remove_steps(self._directory / name, step)
        kept = read_rows(self._directory / METRICS) if (self._directory / METRICS).is_file() else []
        self.evaluations = {row["step"]: row for row in kept if _is_evaluation(row)}
        self._last_step = max((row["step"] for row in kept if not _is_evaluation(row)), default=0)
        self._last_evaluation = max(self.evaluations, default=-1)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Write the row of training step `step` (1..total_steps, rising). `values` holds at least STEP_KEYS without `step`.

        Raises MetricsError for a missing key, a NaN or infinity, a value that is no plain number, or a step out of order.
        """
        if not self._is_writer:
            return
        missing = [key for key in STEP_KEYS if key != "step" and key not in values]
        if missing:
            raise MetricsError(f"step {step}: the row lacks {missing}; give every key of STEP_KEYS, None where there is no value")
        evaluation = [key for key in values if key.startswith("eval/")]
        if evaluation:
            raise MetricsError(f"step {step}: {evaluation} belong to an evaluation; write them with log_evaluation")
        self._check_order(step, self._last_step, "training")
        row = {key: values[key] for key in STEP_KEYS if key != "step"} | dict(values)
        self._write(step, row)
        self._last_step = step
        self._console.step(step, row)

    def log_evaluation(self, step: int, values: Mapping[str, Value]) -> None:
        """Write an evaluation of the policy after `step` updates (0..total_steps, rising). Keys begin with `eval/`; `avg@k` and
        `pass@k` are fractions from 0 to 1. Raises MetricsError otherwise."""
        if not self._is_writer:
            return
        if not values:
            raise MetricsError(f"evaluation at step {step}: there are no values")
        for key, value in values.items():
            if not key.startswith("eval/"):
                raise MetricsError(f"evaluation at step {step}: key {key!r} must begin with 'eval/', e.g. 'eval/aime24/avg@32'")
            if is_accuracy(key) and value is not None and not 0 <= value <= 1:
                raise MetricsError(f"evaluation at step {step}: {key} is {value}, expected a fraction from 0 to 1")
        if self._evaluation_alone:
            remove_step(self._directory / METRICS, step)
        else:
            self._check_order(step, self._last_evaluation, "evaluation")
        self._write(step, dict(values))
        self.evaluations[step] = dict(values)
        self._last_evaluation = step
        self._console.evaluation(step, values)

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of `step` was written; False on ranks that do not write."""
        return self._is_writer and self._last_evaluation >= step

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Append decoded rollouts of an evaluation to samples.jsonl: SAMPLE_KEYS and whatever else is JSON."""
        if self._is_writer and samples:
            with self._forgiving(f"an interrupted evaluation's samples of step {step}"):
                remove_step(self._directory / SAMPLES, step)
            self._lines[SAMPLES].append([_checked_row(step, row, SAMPLE_KEYS, SAMPLES) for row in samples])

    def log_rollouts(self, step: int, method: str, groups: Sequence[ScoredGroup], token_text: Callable[[int], str]) -> None:
        """Write the scored rollouts of a step to `rollouts/`; nothing where there are none."""
        if self._is_writer and groups:
            with self._forgiving(f"{ROLLOUTS} of step {step}"):
                write_scored(self._directory / ROLLOUTS, step, method, groups, token_text)

    def log_token_u(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append mean u by kind of token to token_u.jsonl: TOKEN_U_KEYS (`mean_u` in nats, `count` tokens)."""
        if self._is_writer:
            self._lines[TOKEN_U].append([_checked_row(step, row, TOKEN_U_KEYS, TOKEN_U) for row in rows])

    def log_routing(self, step: int, shares: Sequence[float]) -> None:
        """Append each layer's share of tokens whose router agrees with the given experts to routing.jsonl; nothing where there are none."""
        if self._is_writer and shares:
            self._lines[ROUTING].append([{"step": step, "equal_share": [round(share, 6) for share in shares]}])

    def close(self, *, failed: bool = False) -> None:
        """`failed`: so W&B shows the run. Nothing the second time."""
        if not self._is_writer or self._closed:
            return
        self._closed = True
        for lines in self._lines.values():
            lines.append([])  # what a full disk held up
        self._console.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _check_order(self, step: int, last: int, kind: str) -> None:
        if not last < step <= self._total_steps:
            raise MetricsError(f"{kind} step {step} is out of order: expected a step after {last} and at most {self._total_steps}")

    def _write(self, step: int, values: Mapping[str, Value]) -> None:
        for key, value in values.items():
            _check_value(step, key, value)
        self._lines[METRICS].append([{"step": step, **values}])
        present = {key: value for key, value in values.items() if value is not None}
        if self._tensorboard is not None:
            with self._forgiving(f"TensorBoard's values of step {step}"):
                for key, value in present.items():
                    self._tensorboard.add_scalar(key, value, global_step=step)
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(present, step=step)


    @contextlib.contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._patient:
                raise
            _log.error("%s could not be written: %s", what, error)


def _is_evaluation(row: Mapping[str, Any]) -> bool:
    return all(key == "step" or key.startswith("eval/") for key in row)


def _check_value(step: int, key: str, value: Value) -> None:
    if key == "step":
        raise MetricsError(f"step {step}: the writer sets 'step' itself; leave it out of the values")
    if value is not None and not isinstance(value, (float, int)):
        raise MetricsError(f"step {step}: {key} is a {type(value).__name__}, expected float, int, bool or None (tensors: .item())")
    if value is not None and not math.isfinite(value):
        raise MetricsError(f"step {step}: {key} is {value}; give None where a value does not exist, and look for what made this one")


def _checked_row(step: int, row: Mapping[str, Any], required: Sequence[str], file: str) -> dict[str, Any]:
    missing = [key for key in required if key not in row]
    if missing:
        raise MetricsError(f"step {step}: a row of {file} lacks {missing}; it has {sorted(row)}")
    for key, value in row.items():
        if isinstance(value, float) or key == "step":
            _check_value(step, key, value)
    return {"step": step, **row}


def _open_tensorboard(directory: Path, resume_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = f"logging.tensorboard=true needs the package tensorboard: install it or set logging.tensorboard=false ({error})"
        raise ConfigError(message) from error
    return SummaryWriter(log_dir=str(directory), purge_step=resume_step)


def _open_wandb(directory: Path, project: str, run_name: str) -> Any:
    """Continue the run whose id stands in the directory, or start one. On a resume W&B itself ignores steps it already has."""
    try:
        import wandb
    except ImportError as error:
        message = f"logging.wandb_project={project} needs the package wandb: install it or set logging.wandb_project=null ({error})"
        raise ConfigError(message) from error
    id_file = directory / WANDB_ID
    run_id = id_file.read_text().strip() if id_file.is_file() else None
    run = wandb.init(project=project, name=run_name, dir=str(directory), id=run_id, resume="allow")
    id_file.write_text(run.id + "\n")
    return run
