"""Where a run goes on: from its newest whole checkpoint, from another run's policy, or from the beginning; and how it goes back."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import yaml

from megatron_antisd.config import ConfigError, dump_config
from megatron_antisd.config.changes import check_changes
from megatron_antisd.durable import write_whole
from megatron_antisd.metrics import MetricsWriter, read_rows
from megatron_antisd.metrics.files import CHECKPOINTS, CONFIG, METRICS, WANDB_ID
from megatron_antisd.metrics.journal import read_journal
from megatron_antisd.run import Run, setting_up
from megatron_antisd.supervision.preemption import clear_preempted

_log = logging.getLogger(__name__)


def restore(run: Run) -> Run:
    """Continue this run's newest whole checkpoint, or start from another run's (`checkpoint.continual_from`); then hand the weights to the engine.
    Collective. Raises ConfigError where the checkpoint belongs to another model, data set or configuration, or where none is whole."""
    from megatron_antisd.checkpoint import CheckpointError

    with setting_up(run.supervisor):
        try:
            run = _load_state(run)
        except (CheckpointError, ValueError) as error:
            key = "resume" if run.config.checkpoint.continual_from is None else "continual_from"
            raise error if isinstance(error, ConfigError) else ConfigError(f"checkpoint.{key}: {error}") from error
        run.sync()
    run.mark()
    return run


def _load_state(run: Run) -> Run:
    from megatron_antisd.checkpoint import load_checkpoint, verify
    from megatron_antisd.parallel.stored_weights import on_main

    settings = run.config.checkpoint
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # A launcher that starts the ranks again does not mean a new run, whatever its first start meant.
    newest = _newest_whole(run, run.config.directory) if settings.resume or restarts else None
    if newest is not None:
        changes = _check_config(run, newest)
        state = load_checkpoint(newest, run.trainer)
        if state["method"] != run.config.algorithm.method:  # of a checkpoint that has no configuration with it
            raise ConfigError(f"{newest} was written with algorithm.method={state['method']}, this run has {run.config.algorithm.method}; use "
                              f"another run.name, with checkpoint.continual_from={run.config.directory} to start from its policy")
        run.load_state_dict(state)
        run.sampler.load_state_dict(state["sampler"])
        on_main(run.trainer.layout, lambda: _restore_run_files(run, state))
        made = on_main(run.trainer.layout, lambda: sum(row["kind"] == "rollback" for row in read_journal(run.config.directory)))
        run.health.rollbacks = max(run.health.rollbacks, made)  # a checkpoint does not know of those after it
        _say(run, f"resumed from {newest}" + (f"; changed since: {'; '.join(changes)}" if changes else ""))
        run.journal.write("resumed", run.progress.step, f"resumed from {newest.name}" + (f", restart {restarts} of the launcher" if restarts else ""))
        run.writer.committed = run.progress.step
        return dataclasses.replace(run, first_step=run.progress.step + 1, resumed=True)
    if settings.continual_from is not None:
        given = Path(settings.continual_from)
        if (given / "state.json").is_file():
            source: Path | None = given
            verify(given, run.trainer.layout, checksums=settings.verify == "checksums")
        else:
            source = _newest_whole(run, given)
        if source is None:
            raise ConfigError(f"checkpoint.continual_from: no checkpoint in {given}; expected a run directory with checkpoints/ or one of them")
        state = load_checkpoint(source, run.trainer, restore_rng=False)
        run.sampler.load_state_dict(state["sampler"])
        run.progress.policy_version = state["progress"]["policy_version"]
        _say(run, f"continuing from {source}: weights, optimizer and data position kept, the gate is calibrated anew")
        return dataclasses.replace(run, origin=source)
    return run


def roll_back(run: Run, metrics: MetricsWriter) -> None:
    """Weights, optimizer, generators, gate and counters of the newest whole checkpoint; the data position stays, so that the run goes on with other
    problems. Rows of later steps are removed. Collective. Raises ConfigError or CheckpointError where there is nothing to go back to."""
    from megatron_antisd.checkpoint import load_checkpoint

    failed_step = run.progress.step
    newest = _newest_whole(run, run.config.directory)
    if newest is None:
        raise ConfigError("there is no checkpoint to roll back to: none was written yet (checkpoint.every)")
    state = load_checkpoint(newest, run.trainer)
    if run.ahead is not None:
        run.ahead.clear()  # drawn by the weights that are given up
    run.load_state_dict(state, rolled_back=True)
    metrics.rewind(run.progress.step + 1)
    run.sync()
    run.mark()
    run.writer.committed = 0  # with the data position that it has now, it is another checkpoint
    run.journal.write("rollback", failed_step, f"rolled back to {newest.name}; the problems of steps {run.progress.step + 1} to {failed_step} are "
                      "passed over")


def write_config(run: Run) -> None:
    """Keep the full resolved configuration beside the run's results."""
    if run.is_main:
        run.config.directory.mkdir(parents=True, exist_ok=True)
        clear_preempted(run.config.directory)
        write_whole(run.config.directory / CONFIG, [dump_config(run.config).encode()])


def _newest_whole(run: Run, directory: Path) -> Path | None:
    """Of the checkpoints of the run in `directory`."""
    from megatron_antisd.checkpoint import newest_whole

    return newest_whole(directory / CHECKPOINTS, run.trainer.layout, checksums=run.config.checkpoint.verify == "checksums")


def _check_config(run: Run, newest: Path) -> list[str]:
    from megatron_antisd.parallel.checkpoint_files import RUN_CONFIG
    from megatron_antisd.parallel.stored_weights import on_main

    def read() -> dict[str, Any]:
        path = next((path for path in (newest / RUN_CONFIG, run.config.directory / CONFIG) if path.is_file()), None)
        return {} if path is None else yaml.safe_load(path.read_text())

    return check_changes(on_main(run.trainer.layout, read), run.config, newest.name, moe=run.trainer.description.experts is not None)


def _restore_run_files(run: Run, state: dict[str, Any]) -> None:
    """W&B's id where its file is gone; a word where metrics.jsonl lost rows of steps that are done."""
    wandb_file, metrics_file = run.config.directory / WANDB_ID, run.config.directory / METRICS
    if state.get("wandb_id") and not wandb_file.is_file():
        wandb_file.write_text(state["wandb_id"] + "\n")
    rows = read_rows(metrics_file) if metrics_file.is_file() else []
    missing = sorted(set(range(1, run.progress.step + 1)) - {row["step"] for row in rows if "reward_mean" in row})
    if missing:
        run.journal.write("metrics_lost", run.progress.step, f"{metrics_file} lacks the rows of {len(missing)} finished steps, the first of step "
                          f"{missing[0]}: they are lost; training goes on without them")


def _say(run: Run, text: str) -> None:
    if run.is_main:
        _log.info(text)
