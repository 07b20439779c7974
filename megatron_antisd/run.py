"""Everything a run is made of, built and checked in the one order that works.

Order: configuration rules, process group, (vLLM engine), Megatron's CPU support, groups and trainer, (in-process engine), checkpoint,
first weight sync with its proof. vLLM looks at torch.cuda while it starts and joins the default process group, hence before Megatron.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml

from megatron_antisd.algorithm import EntropyGate
from megatron_antisd.audit.context import ContextInspector
from megatron_antisd.audit.solutions import SolutionCheck
from megatron_antisd.audit.watch import ContextWatch
from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.config import ConfigError, RunConfig, dump_config
from megatron_antisd.data import ProblemDataError, ProblemSampler, PromptBuilder, PromptError
from megatron_antisd.evaluation.evaluator import Evaluator, build_evaluator
from megatron_antisd.grading import GradingError, GradingPool
from megatron_antisd.inputs import Inputs, read_inputs
from megatron_antisd.metrics.files import CONFIG
from megatron_antisd.policy import build_engine_and_trainer, build_probe
from megatron_antisd.rollout.engine import Engine, EngineError, Sampling
from megatron_antisd.rollout.probe import ProbeResult, SyncProbe, synchronise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_antisd.parallel.trainer import Trainer

_log = logging.getLogger(__name__)

SETUP_ERRORS = (ConfigError, ProblemDataError, PromptError, GradingError, EngineError)
"""What `load_config` and `build_run` raise for bad input; the message says it all."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of a run, ready for step `progress.step + 1`."""

    config: RunConfig
    trainer: Trainer
    engine: Engine
    probe: SyncProbe
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    sampler: ProblemSampler
    grader: GradingPool
    gate: EntropyGate
    evaluator: Evaluator
    sampling: Sampling
    progress: Progress
    resumed: bool
    is_main: bool
    first_step: int
    """The first step that this process trains."""
    watch: ContextWatch | None
    """On the main rank alone."""

    def decode(self, ids: Sequence[int]) -> str:
        """Response text without special tokens."""
        return self.evaluator.decode(ids)

    def token_text(self, token: int) -> str:
        """One token's text, special ones by their name."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def sync(self) -> ProbeResult:
        """The trainer's weights into the engine, proved."""
        return synchronise(self.engine, self.trainer.export(), self.progress.policy_version, self.probe)

    def save_huggingface(self, directory: Path) -> None:
        """The policy as an ordinary Hugging Face checkpoint; collective."""
        from megatron_antisd.parallel.reshard import save_huggingface

        save_huggingface(self.trainer.export(), self.config.model.path, directory, write=self.is_main)

    def state_dict(self) -> dict[str, Any]:
        """All training state outside model, optimizer and random generators; plain JSON."""
        return {"progress": vars(self.progress), "gate": self.gate.state_dict(), "sampler": self.sampler.state_dict(),
                "method": self.config.algorithm.method}

    def close(self) -> None:
        self.grader.close()
        self.engine.close()


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
    """Build all parts on this rank; collective. Raises ConfigError before anything heavy starts when the configuration cannot run."""
    from megatron_antisd.parallel.layout import start_process_group

    inputs = read_inputs(config, training=True)
    sampler = ProblemSampler(inputs.problems, config.rollout.problems_per_step, config.run.seed, config.data.shuffle)
    start_process_group(config.parallel.timeout_seconds)
    engine, trainer = build_engine_and_trainer(config, inputs.max_context)
    main = dist.get_rank() == 0
    run = Run(
        config=config, trainer=trainer, engine=engine, tokenizer=inputs.tokenizer, prompts=inputs.prompts, grader=inputs.grader,
        sampler=sampler,
        gate=EntropyGate(**config.gate.model_dump(), lambda_max=config.algorithm.lambda_max),
        evaluator=build_evaluator(config, inputs, engine, config.directory, is_main=main),
        sampling=Sampling(temperature=config.rollout.temperature, top_p=config.rollout.top_p, max_new_tokens=config.rollout.max_new_tokens,
                          ignore_eos=config.rollout.ignore_eos, stop_token_ids=inputs.stop_token_ids),
        probe=build_probe(config, inputs, inputs.problems[0], trainer), progress=Progress(), resumed=False, is_main=main, first_step=1,
        watch=_build_watch(config, inputs) if main else None)
    run = _restore(run)
    run.sync()
    return run


def _build_watch(config: RunConfig, inputs: Inputs) -> ContextWatch:
    return ContextWatch(ContextInspector(inputs.prompts, inputs.tokenizer), SolutionCheck(inputs.grader, inputs.prompts), config.model.dtype)


def _restore(run: Run) -> Run:
    """Continue this run's newest checkpoint, or start from another run's (`checkpoint.continual_from`). Raises ConfigError where it belongs to
    another model, data set or configuration."""
    from megatron_antisd.checkpoint import CheckpointError

    try:
        return _load_state(run)
    except (CheckpointError, ValueError) as error:
        key = "resume" if run.config.checkpoint.continual_from is None else "continual_from"
        raise error if isinstance(error, ConfigError) else ConfigError(f"checkpoint.{key}: {error}") from error


def _load_state(run: Run) -> Run:
    from megatron_antisd.checkpoint import latest_checkpoint, load_checkpoint

    settings = run.config.checkpoint
    newest = latest_checkpoint(run.config.directory / "checkpoints") if settings.resume else None
    if newest is not None:
        state = load_checkpoint(newest, run.trainer)
        if state["method"] != run.config.algorithm.method:
            raise ConfigError(f"checkpoint.resume: {newest} was written with algorithm.method={state['method']}, this run has "
                              f"{run.config.algorithm.method}; use another run.name, with checkpoint.continual_from={run.config.directory} "
                              "to start from its policy")
        run.gate.load_state_dict(state["gate"])
        run.sampler.load_state_dict(state["sampler"])
        _say(run, f"resumed from {newest}")
        progress = Progress(**state["progress"])
        return dataclasses.replace(run, progress=progress, first_step=progress.step + 1, resumed=True)
    if settings.continual_from is not None:
        given = Path(settings.continual_from)
        source = given if (given / "state.json").is_file() else latest_checkpoint(given / "checkpoints")
        if source is None:
            raise ConfigError(f"checkpoint.continual_from: no checkpoint in {given}; expected a run directory with checkpoints/ or one of them")
        state = load_checkpoint(source, run.trainer, restore_rng=False)
        run.sampler.load_state_dict(state["sampler"])
        _say(run, f"continuing from {source}: weights, optimizer and data position kept, the gate is calibrated anew")
        return dataclasses.replace(run, progress=Progress(policy_version=state["progress"]["policy_version"]))
    return run


def write_config(run: Run) -> None:
    """Keep the full resolved configuration beside the run's results; say what a resume changes. For a run that trains."""
    if not run.is_main:
        return
    path = run.config.directory / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.resumed and path.is_file():
        before, now = yaml.safe_load(path.read_text()), run.config.model_dump(mode="json")
        changed = [f"{s}.{k}: {before.get(s, {}).get(k)!r} -> {v!r}" for s in now for k, v in now[s].items() if before.get(s, {}).get(k) != v]
        if changed:
            _say(run, "the configuration changed since the checkpoint: " + "; ".join(changed))
    path.write_text(dump_config(run.config))


def _say(run: Run, text: str) -> None:
    if run.is_main:
        _log.info(text)


def _environment(name: str, default: str) -> str:
    import os

    return os.environ.get(name, default)


def set_up_logging() -> None:
    """One plain line a message, from rank 0 at INFO, from others only warnings; no noise from libraries."""
    quiet_libraries()
    main = _environment("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_antisd").setLevel(logging.INFO if main else logging.WARNING)
    torch.set_num_threads(int(_environment("OMP_NUM_THREADS", "1")))
