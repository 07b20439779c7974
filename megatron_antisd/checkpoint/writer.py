"""Writes checkpoints beside their place, while training goes on, and commits each by one rename.

The main thread copies the state to host memory. A thread writes it, with collectives of its own over a process group of its own: each rank its
files, whose digests are taken on the way; rank 0 last writes the manifest, gives the directory its name and removes what it supersedes. So
whatever bears the name of a checkpoint is whole, and a failure on any rank is known on all.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_antisd.checkpoint.contents import describe_trainer, generator_tensors, trainer_tensors
from megatron_antisd.checkpoint.generators import generator_states
from megatron_antisd.checkpoint.retention import superseded
from megatron_antisd.checkpoint.snapshot import HostCopies
from megatron_antisd.checkpoint.tensor_files import TensorFileWriter
from megatron_antisd.config import dump_config
from megatron_antisd.durable import file_sha256, sync, write_json
from megatron_antisd.models.huggingface import copy_model_files
from megatron_antisd.parallel.checkpoint_files import (
    RUN_CONFIG,
    STATE,
    UNFINISHED,
    CheckpointError,
    checkpoints,
    step_directory,
    step_of,
    write_manifest,
)
from megatron_antisd.parallel.global_tensors import GlobalTensor, SavePlanner
from megatron_antisd.parallel.stored_weights import failures
from megatron_antisd.parallel.trainer import Trainer

log = logging.getLogger(__name__)
TENSORS = "tensors"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One checkpoint to write."""

    step: int
    tensors: Mapping[str, GlobalTensor]
    manifest: Mapping[str, Any]
    state: Mapping[str, Any]
    scores: Mapping[int, float]


class CheckpointWriter:
    """Saves the checkpoints of one run into `directory`, a file system that all ranks share. Construction and every method but `failed` are
    collective. As a context manager it waits at the end for what is being written."""

    def __init__(self, directory: Path, trainer: Trainer) -> None:
        self.directory, self._trainer = directory, trainer
        self._settings = trainer.config.checkpoint
        self._layout = trainer.layout
        self._group = self._new_group()
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._group_broke = False
        self.committed = 0
        """The step of this run's newest checkpoint, 0 where there is none; the same on every rank after `wait`. The caller sets it on a resume."""

    def save(self, step: int, state: Mapping[str, Any], *, generators: Mapping[str, torch.Tensor] | None = None,
             scores: Mapping[int, float] | None = None, wait: bool = False) -> None:
        """Write `directory/step_<step>`; a checkpoint of the same step is replaced. `state` must be JSON-able, `generators` are those of
        `generator_states` (None: the present ones), `scores` is what retention goes by. Returns once the state is copied, or with `wait`, and without
        `checkpoint.background`, once the checkpoint has its name; first it waits for the one before.

        Raises CheckpointError, on every rank, when writing failed, be it this one or the one before; older checkpoints are then still there.
        """
        self.wait()
        self._renew_group()
        background = self._settings.background and not wait
        tensors, optimizer_step = trainer_tensors(self._trainer)
        tensors |= generator_tensors(self._layout, dict(generators or generator_states(self._layout)))
        manifest = {"step": step, "optimizer_step": optimizer_step, "policy_version": state.get("progress", {}).get("policy_version"),
                    **describe_trainer(self._trainer)}
        # Without a thread nothing moves meanwhile: no copy is needed.
        job = _Job(step=step, tensors=self._copies.take(tensors) if background else tensors, manifest=manifest, state=state, scores=scores or {})
        if not background:
            self._run(job)
            self.wait()
            return
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises CheckpointError, once and on every rank, for what failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known here to have failed; other ranks may learn it a moment later."""
        return self._failure is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if kind is None:
                raise
            log.error("%s", failure)  # the run ends for another reason already

    def _new_group(self) -> dist.ProcessGroup:
        """Its own: these collectives run beside those of the step, in no fixed order with them."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self._trainer.config.supervision.save_seconds))

    def _renew_group(self) -> None:
        """A group in which a collective timed out is closed for good: no checkpoint would ever be written again."""
        broke = torch.tensor([self._group_broke], dtype=torch.int32)
        dist.all_reduce(broke, op=dist.ReduceOp.MAX)
        if broke.item():
            self._group, self._group_broke = self._new_group(), False

    # -- in the thread

    def _run(self, job: _Job) -> None:
        started = time.monotonic()
        try:
            self._write(job)
            self.committed = job.step
        except CheckpointError as error:
            self._failure = error
        except Exception as error:  # a time-out of the group, a fault of ours: `wait` must tell it in any case
            self._group_broke = True
            self._failure = CheckpointError(f"could not write the checkpoint of step {job.step}: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
        if self._layout.is_main and self._failure is not None:
            log.error("%s", self._failure)
        elif self._layout.is_main:
            log.info("checkpoint of step %d: written in %.1f s", job.step, time.monotonic() - started)

    def _write(self, job: _Job) -> None:
        target = step_directory(self.directory, job.step)
        partial = target.with_name(target.name + UNFINISHED)
        self._together(lambda: _prepare(self.directory, partial) if self._layout.is_main else None, partial)
        try:
            writer = self._save_tensors(job, partial / TENSORS)
            mine = self._together(lambda: {f"{TENSORS}/{name}": entry for name, entry in writer.written.items()}, partial)
            files = {name: entry for part in mine for name, entry in part.items()}
            self._together(lambda: self._commit(job, partial, target, files) if self._layout.is_main else None, partial)
        except CheckpointError:
            if self._layout.is_main:
                shutil.rmtree(partial, ignore_errors=True)  # room for the next attempt; what cannot be removed now is removed then
            raise

    def _save_tensors(self, job: _Job, directory: Path) -> TensorFileWriter:
        writer = TensorFileWriter(directory)
        try:
            dcp.save(dict(job.tensors), storage_writer=writer, planner=SavePlanner(flatten_state_dict=False), process_group=self._group)
        except CheckpointException as error:
            raise CheckpointError(_cannot_write(directory.parent, failures(error))) from error
        return writer

    def _together(self, action: Callable[[], T], partial: Path) -> list[T]:
        """`action` on every rank, all results on every rank; where one fails, CheckpointError on all."""
        result, failure, cause = None, None, None
        try:
            result = action()
        except (OSError, TypeError, ValueError, CheckpointError) as error:
            failure, cause = (str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"), error
        everyone: list[Any] = [None] * self._layout.world_size
        dist.all_gather_object(everyone, (result, failure), group=self._group)
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(everyone) if text is not None]
        if failed:
            raise CheckpointError(_cannot_write(partial, "; ".join(failed))) from cause
        return [result for result, _ in everyone]

    def _commit(self, job: _Job, partial: Path, target: Path, files: dict[str, tuple[int, str]]) -> None:
        copied = copy_model_files(Path(self._trainer.config.model.path), partial)
        write_json(partial / STATE, job.state)
        config = dump_config(self._trainer.config)
        (partial / RUN_CONFIG).write_text(config)
        for file in (partial / STATE, partial / RUN_CONFIG, partial / TENSORS / ".metadata", *copied):
            sync(file)
            files[str(file.relative_to(partial))] = (file.stat().st_size, file_sha256(file))
        unseen = [name for name, (size, _) in files.items() if not (partial / name).is_file() or (partial / name).stat().st_size != size]
        if unseen:
            raise CheckpointError(f"rank 0 does not see {unseen[:3]} as another rank wrote them: checkpoints must go to a file system that all nodes "
                                  "share (run.directory)")
        manifest = {**job.manifest, "config_hash": hashlib.sha256(config.encode()).hexdigest()[:16]}
        write_manifest(partial, manifest, {name: size for name, (size, _) in files.items()}, {name: sha for name, (_, sha) in files.items()})
        for folder in (partial / TENSORS, partial):
            sync(folder)
        replaced = _put_aside(target) if target.exists() else None
        partial.rename(target)
        sync(self.directory)
        old = {step_of(path): path for path in checkpoints(self.directory)}
        gone = [_put_aside(old[step]) for step in superseded(list(old), job.step, job.scores, self._settings)]
        for doomed in [*gone, *([replaced] if replaced is not None else [])]:
            _delete(doomed)


# -- files


def _prepare(directory: Path, partial: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"step_*{UNFINISHED}"):
        log.info("%s was left by a save that was interrupted; it is removed", leftover)
        _delete(leftover)
    partial.mkdir()


def _put_aside(path: Path) -> Path:
    """Takes the name away: a half-deleted directory is never taken for a checkpoint."""
    number = 0
    while (doomed := path.with_name(f"{path.name}.deleted-{number}{UNFINISHED}")).exists():
        number += 1
    return path.rename(doomed)


def _delete(path: Path) -> None:
    """What somebody has open, or may not be touched, must not fail the checkpoint that is whole; the next save tries again."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error)


def _cannot_write(partial: Path, why: str) -> str:
    return (f"could not write {partial}: {why}. Older checkpoints are as they were. Make room or give another run.directory; with "
            "checkpoint.on_failure=continue the run goes on and tries again at the next checkpoint")
