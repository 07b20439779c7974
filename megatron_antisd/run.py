"""Everything a run is made of, built and checked in the one order that works.

Order: configuration rules, process group, (vLLM engine), Megatron's CPU support, groups and trainer, (in-process engine), checkpoint,
first weight sync with its proof. vLLM looks at torch.cuda while it starts and joins the default process group, hence before Megatron.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
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
from megatron_antisd.config import ConfigError, RunConfig, dump_config, rules
from megatron_antisd.data import ProblemDataError, ProblemSampler, PromptBuilder, PromptError, load_problems, load_tokenizer, stop_token_ids
from megatron_antisd.grading import GradingError, GradingPool
from megatron_antisd.records import Problem
from megatron_antisd.rollout.engine import Engine, EngineError, Sampling
from megatron_antisd.rollout.probe import DEFAULT_LIMIT, ProbeResult, SyncProbe, synchronise

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
    benchmarks: dict[str, list[Problem]]
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
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

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

    world = int(_environment("WORLD_SIZE", "1"))
    model = _model_config(config)
    rules.check(config, model, world)
    tokenizer = load_tokenizer(config.model.path, model["vocab_size"])
    problems = load_problems(config.data.train)
    benchmarks = {b.name: load_problems([b.path]) for b in config.evaluation.benchmarks}
    context = rules.max_context(config, model)
    prompts = PromptBuilder(tokenizer, config.data, config.privileged, context)
    _check_prompts(config, prompts, problems, benchmarks)
    stop_ids = stop_token_ids(tokenizer, config.model.path)
    sampler = ProblemSampler(problems, config.rollout.problems_per_step, config.run.seed, config.data.shuffle)
    grader = GradingPool(config.grading.workers, config.grading.timeout_seconds, config.grading.function)

    start_process_group(config.parallel.timeout_seconds)
    engine, trainer = _build_engine_and_trainer(config, context)
    run = Run(
        config=config, trainer=trainer, engine=engine, tokenizer=tokenizer, prompts=prompts, sampler=sampler, grader=grader,
        gate=EntropyGate(**config.gate.model_dump(), lambda_max=config.algorithm.lambda_max), benchmarks=benchmarks,
        sampling=Sampling(temperature=config.rollout.temperature, top_p=config.rollout.top_p, max_new_tokens=config.rollout.max_new_tokens,
                          ignore_eos=config.rollout.ignore_eos, stop_token_ids=stop_ids),
        probe=SyncProbe(
            prompts.student_prompt(problems[0]), score=trainer.score, copies=world, max_context=context, temperature=config.rollout.temperature,
            limit=config.rollout.probe_max_mean or DEFAULT_LIMIT[config.model.dtype]),
        progress=Progress(), resumed=False, is_main=dist.get_rank() == 0, first_step=1, watch=None)
    run = _restore(run)
    if run.is_main:
        watch = ContextWatch(ContextInspector(prompts, tokenizer), SolutionCheck(grader, prompts), config.model.dtype)
        run = dataclasses.replace(run, watch=watch)
    run.sync()
    return run


def _check_prompts(config: RunConfig, prompts: PromptBuilder, problems: Sequence[Problem], benchmarks: Mapping[str, Sequence[Problem]]) -> None:
    prompts.require_room(problems, config.rollout.max_new_tokens, "rollout.max_new_tokens")
    for held_out in benchmarks.values():
        if config.evaluation.max_new_tokens is None:
            prompts.require_room(held_out, config.rollout.max_new_tokens, "rollout.max_new_tokens")
        else:
            prompts.require_room(held_out, config.evaluation.max_new_tokens, "evaluation.max_new_tokens")


def _build_engine_and_trainer(config: RunConfig, context: int) -> tuple[Engine, Trainer]:
    engine: Engine | None = None
    if config.rollout.engine == "vllm":
        from megatron_antisd.parallel.checkpoint_files import is_checkpoint
        from megatron_antisd.rollout.vllm_engine import VllmEngine

        # vLLM cannot read a checkpoint's tensors; its first weights come from the trainer in any case.
        engine = VllmEngine(config.model.path, rollout=config.rollout, dtype=config.model.dtype, seed=config.run.seed, max_context=context,
                            load_format="dummy" if is_checkpoint(config.model.path) else "auto",
                            timeout_seconds=config.parallel.timeout_seconds)
    from megatron_antisd.compat import megatron_cpu

    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.layout import build_layout
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, config.run.seed)
    trainer = Trainer(config, layout, describe(config.model.path, layout.tensor_size))
    if engine is None:
        from megatron_antisd.rollout.megatron_engine import MegatronEngine

        engine = MegatronEngine(trainer, max_context=context, max_sequences=config.rollout.max_sequences)
    return engine, trainer


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
    path = run.config.directory / "config.yaml"
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


def _model_config(config: RunConfig) -> dict[str, Any]:
    path = Path(config.model.path) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path: no config.json in {config.model.path}; expected a Hugging Face checkpoint directory")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON: {error}") from error


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
