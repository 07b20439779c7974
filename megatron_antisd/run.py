"""Everything a run is made of, built and checked in the one order that works.

Order: configuration rules, process group, lock and watchdog, (vLLM engine), Megatron's CPU support, groups and trainer, (in-process engine); then,
in `resume.py`, checkpoint and first weight sync with its proof. vLLM looks at torch.cuda while it starts and joins the default process group, hence
before Megatron.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist

from megatron_antisd.ahead import Ahead
from megatron_antisd.algorithm import EntropyGate
from megatron_antisd.audit.context import ContextInspector
from megatron_antisd.audit.solutions import SolutionCheck
from megatron_antisd.audit.watch import ContextWatch
from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.config import ConfigError, RunConfig
from megatron_antisd.config.rollout_rules import routing_replay
from megatron_antisd.data import ProblemDataError, ProblemSampler, PromptBuilder, PromptError
from megatron_antisd.evaluation.evaluator import Evaluator, agreed, build_evaluator
from megatron_antisd.grading import GradingError, GradingPool
from megatron_antisd.health import HealthMonitor, Incident
from megatron_antisd.inputs import Inputs, read_inputs
from megatron_antisd.metrics import MetricsWriter
from megatron_antisd.metrics.files import CHECKPOINTS
from megatron_antisd.metrics.journal import Journal
from megatron_antisd.metrics.lock import RunLock
from megatron_antisd.policy import build_policy
from megatron_antisd.rollout.engine import EngineError, Sampling
from megatron_antisd.rollout.lengths import ResponseLengths
from megatron_antisd.rollout.probe import ProbeResult, SyncProbe, synchronise
from megatron_antisd.rollout.restarting import RestartingEngine
from megatron_antisd.routing import RoutingReplay
from megatron_antisd.supervision import collectives, preemption
from megatron_antisd.supervision.supervisor import Supervisor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_antisd.checkpoint import CheckpointWriter
    from megatron_antisd.parallel.trainer import Trainer

_log = logging.getLogger(__name__)

SETUP_ERRORS = (ConfigError, ProblemDataError, PromptError, GradingError, EngineError)
"""What `load_config` and `build_run` raise for bad input; the message says it all."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, ready for step `progress.step + 1`."""

    config: RunConfig
    trainer: Trainer
    engine: RestartingEngine
    probe: SyncProbe
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    sampler: ProblemSampler
    grader: GradingPool
    gate: EntropyGate
    evaluator: Evaluator
    sampling: Sampling
    routing: RoutingReplay
    ahead: Ahead | None
    """Where batches are drawn while others are trained on."""
    progress: Progress
    health: HealthMonitor
    writer: CheckpointWriter
    supervisor: Supervisor
    journal: Journal
    lock: RunLock | None
    """On the main rank alone."""
    is_main: bool
    watch: ContextWatch | None
    """On the main rank alone."""
    first_step: int = 1
    """The first step that this process trains."""
    resumed: bool = False
    origin: Path | None = None
    """The checkpoint that a continual run began with."""
    boundary: Boundary = field(default_factory=lambda: Boundary())
    lengths: ResponseLengths = field(default_factory=ResponseLengths)
    floor: FloorState = field(default_factory=lambda: FloorState())
    incidents: list[Incident] = field(default_factory=list)
    """What was found in the present step, until it is acted upon."""

    def decode(self, ids: Sequence[int]) -> str:
        """Response text without special tokens."""
        return self.evaluator.decode(ids)

    def token_text(self, token: int) -> str:
        """One token's text, special ones by their name."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def sync(self) -> ProbeResult:
        """The trainer's weights into the engine, proved."""
        return synchronise(self.engine, self.trainer.engine_weights, self.progress.policy_version, self.probe)

    def save_huggingface(self, directory: Path) -> None:
        """The policy as an ordinary Hugging Face checkpoint; collective."""
        from megatron_antisd.parallel.reshard import save_huggingface

        save_huggingface(self.trainer.export(), self.config.model.path, directory, write=self.is_main)

    def state_dict(self, metrics: MetricsWriter | None = None) -> dict[str, Any]:
        """All training state outside model, optimizer and random generators; plain JSON. What is known of files is the main rank's."""
        return {"progress": vars(self.progress), "gate": self.gate.state_dict(),
                "sampler": self.sampler.state_dict() if self.ahead is None else self.ahead.sampler_state(),
                "health": self.health.state_dict(), "lengths": self.lengths.state_dict(), "method": self.config.algorithm.method,
                "wandb_id": metrics and metrics.wandb_id}

    def load_state_dict(self, state: Mapping[str, Any], *, rolled_back: bool = False) -> None:
        """Continue where `state_dict` was taken, but for the data position, which the caller restores or, for a rollback, leaves."""
        self.gate.load_state_dict(state["gate"])
        if "health" in state:  # older checkpoints have none
            self.health.roll_back(state["health"]) if rolled_back else self.health.load_state_dict(state["health"])
        self.lengths.load_state_dict(state.get("lengths", {}))
        vars(self.progress).update(state["progress"])

    def mark(self, metrics: MetricsWriter | None = None) -> None:
        """Remember the state between two steps: a step that is dropped half-way leaves it to be saved."""
        from megatron_antisd.checkpoint.generators import generator_states

        self.boundary.step = self.progress.step
        self.boundary.state = copy.deepcopy(self.state_dict(metrics))
        self.boundary.generators = generator_states(self.trainer.layout)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, then free everything. May be called twice."""
        self.writer.wait()
        self._free()

    def tell(self, error: Exception) -> None:
        """Log a failure and tell the other ranks of it; nothing where supervision has ended."""
        self.supervisor.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.writer.__exit__(kind, error, trace)
            self.supervisor.__exit__(kind, error, trace)
        finally:
            self._free()
        if kind is None:  # else the process ends by its exception, and torchrun's SIGTERM must not cut off its exit code and last words
            preemption.uninstall()

    def _free(self) -> None:
        self.journal.close()
        self.supervisor.close()
        self.grader.close()
        self.engine.close()
        if self.lock is not None:
            self.lock.release()


@dataclass(kw_only=True)
class Boundary:
    """The state between the last two steps."""

    step: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class FloorState:
    """Of the noise floor of u, which every process measures once."""

    pending: bool = True
    """Until the first update that it could be measured in."""


@dataclass(kw_only=True)
class Progress:
    """Counters that are training state."""

    step: int = 0
    """Steps done."""
    policy_version: int = 0
    """Updates applied."""
    skipped_in_a_row: int = 0
    skipped: int = 0


def build_run(config: RunConfig) -> Run:
    """Build all parts on this rank, for `resume.restore` to fill; collective. Raises ConfigError before anything heavy starts when the configuration
    cannot run, or another run has the directory."""
    from megatron_antisd.parallel.layout import start_process_group

    inputs = read_inputs(config, training=True)
    sampler = ProblemSampler(inputs.problems, config.problems_drawn(config.rollout.problems_per_step), config.run.seed, config.data.shuffle)
    start_process_group(config.collective_seconds)
    main = dist.get_rank() == 0
    lock = _lock(config, main)
    supervisor = start_supervisor(config)
    with setting_up(supervisor):
        engine, trainer, probe = build_policy(config, inputs, inputs.problems[0])
        replay = routing_replay(config, moe=trainer.description.experts is not None)
        from megatron_antisd.checkpoint import CheckpointWriter

        sampling = Sampling(temperature=config.rollout.temperature, top_p=config.rollout.top_p, max_new_tokens=config.rollout.max_new_tokens,
                            ignore_eos=config.rollout.ignore_eos, stop_token_ids=inputs.stop_token_ids, routes=replay == "engine")
        evaluator = build_evaluator(config, inputs, engine, config.directory, is_main=main)
        return Run(
            config=config, trainer=trainer, engine=engine, tokenizer=inputs.tokenizer, prompts=inputs.prompts, grader=inputs.grader,
            sampler=sampler,
            gate=EntropyGate(**config.gate.model_dump(), lambda_max=config.algorithm.lambda_max),
            evaluator=evaluator, sampling=sampling,
            ahead=None if config.asynchrony.max_staleness == 0 else Ahead(
                config, engine=engine, sampler=sampler, prompts=inputs.prompts, sampling=sampling, decode=evaluator.decode, is_main=main),
            routing=RoutingReplay(config=config, replay=replay), probe=probe, progress=Progress(),
            health=HealthMonitor(config.health, on_policy=config.asynchrony.max_staleness == 0),
            writer=CheckpointWriter(config.directory / CHECKPOINTS, trainer), supervisor=supervisor,
            journal=Journal(config.directory, is_writer=main), lock=lock, is_main=main, watch=_build_watch(config, inputs) if main else None)


@contextlib.contextmanager
def setting_up(supervisor: Supervisor) -> Iterator[None]:
    """The stage `setup`. What fails on one rank is told to the others; bad input is the same on all, and its message says it all."""
    try:
        with supervisor.stage("setup"):
            yield
    except SETUP_ERRORS:
        supervisor.close()
        raise
    except BaseException as error:
        supervisor.__exit__(type(error), error, error.__traceback__)
        raise


def start_supervisor(config: RunConfig) -> Supervisor:
    """The watchdog of this rank, and the signals that ask it to stop. After the process group has started."""
    from torch.distributed.distributed_c10d import _get_default_store

    collectives.install()
    preemption.install()
    return Supervisor(config.supervision, directory=config.directory, store=_get_default_store(), rank=dist.get_rank(),
                      world_size=dist.get_world_size())


def _lock(config: RunConfig, main: bool) -> RunLock | None:
    """The run directory, for this run alone; where it is taken, ConfigError on every rank."""
    lock, refused = None, None
    if main:
        try:
            lock = RunLock(config.directory)
        except (ConfigError, OSError) as error:
            refused = str(error) if isinstance(error, ConfigError) else f"run.directory={config.directory} cannot be written: {error}"
    refused = agreed(refused)
    if refused is not None:
        raise ConfigError(refused)
    return lock


def _build_watch(config: RunConfig, inputs: Inputs) -> ContextWatch:
    return ContextWatch(ContextInspector(inputs.prompts, inputs.tokenizer), SolutionCheck(inputs.grader, inputs.prompts), config.model.dtype)


def set_up_logging() -> None:
    """One plain line a message, from rank 0 at INFO, from others only warnings; no noise from libraries."""
    quiet_libraries()
    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_antisd").setLevel(logging.INFO if main else logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
