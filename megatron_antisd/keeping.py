"""What the loop does besides training: save, stop when it is asked to, and act on numbers that are not sane. Everything here is collective."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_antisd.health import strongest
from megatron_antisd.metrics import MetricsWriter
from megatron_antisd.metrics.files import INCIDENTS
from megatron_antisd.metrics.stages import NamedRange
from megatron_antisd.records import RolloutGroup
from megatron_antisd.resume import roll_back
from megatron_antisd.rollout.replay import save_rollouts
from megatron_antisd.run import Run
from megatron_antisd.supervision import preemption
from megatron_antisd.supervision.preemption import Preempted, leave_preempted

_log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and where the last checkpoint is."""


def supervised(run: Run, step: int, named_range: NamedRange | None) -> NamedRange:
    """Each stage of a step under its time-out, and as a range of the trace where there is one."""

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        with run.supervisor.stage(name, step), named_range(name) if named_range is not None else contextlib.nullcontext():
            yield

    return stage


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def save(run: Run, metrics: MetricsWriter) -> None:
    """A checkpoint, every `checkpoint.every` steps and at the last. Raises TrainingStopped where one cannot be written and
    `checkpoint.on_failure` is `stop`."""
    settings, step = run.config.checkpoint, run.progress.step
    run.mark(metrics)
    last = step == run.config.run.steps and (settings.every or run.writer.committed)  # one of a preemption must not stay the newest
    if last or (settings.every and step % settings.every == 0):
        with run.supervisor.stage("save", step):
            _write_checkpoint(run, metrics, wait=False)


def finish(run: Run) -> None:
    """Wait for the last checkpoint."""
    with run.supervisor.stage("save", run.progress.step):
        _try(run, run.writer.wait)


def _write_checkpoint(run: Run, metrics: MetricsWriter, *, wait: bool) -> None:
    key = run.config.checkpoint.best_metric or _first_accuracy(run)
    scores = {step: row[key] for step, row in metrics.evaluations.items() if row.get(key) is not None}
    _try(run, run.writer.wait)  # a failure of the one before must not take this one's place
    _try(run, lambda: run.writer.save(run.boundary.step, run.boundary.state, generators=run.boundary.generators, scores=scores, wait=wait))


def _try(run: Run, action: Callable[[], None]) -> None:
    from megatron_antisd.checkpoint import CheckpointError

    try:
        action()
    except CheckpointError as error:
        if run.config.checkpoint.on_failure == "stop":
            _stop(run, str(error))
        run.journal.write("checkpoint_failed", run.progress.step, str(error))


def _first_accuracy(run: Run) -> str:
    benchmarks = run.config.evaluation.benchmarks
    return f"eval/{benchmarks[0].name}/avg@{benchmarks[0].samples}" if benchmarks else ""


# -- stopping when asked --------------------------------------------------------------------------------------------------


def pause(run: Run) -> None:
    """Between stages where a step may still be dropped. Raises Preempted, on every rank, when any was asked to stop; TrainingStopped when a
    checkpoint failed in the background and `checkpoint.on_failure` is `stop`."""
    word = torch.tensor([preemption.requested(), run.writer.failed], dtype=torch.int32)
    dist.all_reduce(word, op=dist.ReduceOp.MAX)
    asked, failed = map(bool, word.tolist())
    if failed:
        with run.supervisor.stage("save", run.progress.step):
            _try(run, run.writer.wait)
    if asked:
        raise Preempted(f"asked to stop after step {run.boundary.step}")


def leave(run: Run, metrics: MetricsWriter, reason: Preempted) -> None:
    """Save what is not saved yet and end this process with the exit code that schedulers may requeue on."""
    from megatron_antisd.parallel.checkpoint_files import step_directory

    with run.supervisor.stage("save", run.boundary.step):
        _try(run, run.writer.wait)
        if run.boundary.step > run.writer.committed:
            _write_checkpoint(run, metrics, wait=True)
    saved = run.writer.committed
    whence = f"behind step {saved}" if saved else "from the start"
    run.journal.write("preempted", run.boundary.step, f"{reason}; the same command goes on {whence}")
    run.supervisor.close()
    try:  # the exit code is settled first: freeing an engine and ending W&B may take longer than the scheduler waits
        leave_preempted(run.config.directory, run.boundary.step, step_directory(run.writer.directory, saved) if saved else None)
    finally:
        metrics.close()
        run.close()


# -- incidents ------------------------------------------------------------------------------------------------------------


def act_on_incidents(run: Run, metrics: MetricsWriter, groups: Sequence[RolloutGroup], step: int) -> bool:
    """Write the incidents of a step down, keep its rollouts, and do what the strongest asks for. Returns whether the run went back to a checkpoint.
    Raises TrainingStopped."""
    incidents = list(run.incidents)
    run.incidents.clear()
    if not incidents:
        return False
    kept = _keep_rollouts(run, groups, step)
    for incident in incidents:
        run.journal.write("incident", step, incident.message, incident=incident.kind, action=incident.action, value=incident.row()["value"],
                          limit=incident.limit, rollouts=kept)
    action = strongest(incidents)
    if action == "stop":
        _stop(run, next(incident.message for incident in incidents if incident.action == "stop"))
    progress, limit = run.progress, run.config.optimizer.max_skipped_in_a_row
    if action == "skip" and progress.skipped_in_a_row >= limit:
        _stop(run, f"{limit} updates in a row were left out (optimizer.max_skipped_in_a_row), the last one for: {incidents[-1].message}")
    if action == "rollback":
        with run.supervisor.stage("setup", step):
            _try(run, run.writer.wait)
            roll_back(run, metrics)
            _write_checkpoint(run, metrics, wait=True)  # whoever resumes before the next one must not meet the same problems again
    return action == "rollback"


def _stop(run: Run, why: str) -> NoReturn:
    """The same on every rank: it is no failure of a rank, and starting the ranks again would lead to the same."""
    _try(run, run.writer.wait)
    run.supervisor.close()
    preemption.stop_launcher()
    raise TrainingStopped(f"{why}; the weights are those of update {run.progress.policy_version}, checkpoints are in {run.writer.directory}")


def _keep_rollouts(run: Run, groups: Sequence[RolloutGroup], step: int) -> str | None:
    """Where they lie, below the run directory; None where there are enough already."""
    directory = run.config.directory / INCIDENTS
    if run.is_main and len(list(directory.glob("step_*.jsonl"))) < run.config.health.saved_incidents:
        try:
            save_rollouts(directory, step, groups)
        except OSError as error:
            _log.error("the rollouts of step %d could not be kept in %s: %s", step, directory, error)
            return None
        return f"{INCIDENTS}/step_{step:06d}.jsonl"
    return None
