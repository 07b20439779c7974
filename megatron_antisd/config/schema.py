"""Every configuration key: its type, default and meaning stand here, those of model and trainer in `training`, those of rollouts in `rollout`,
those that keep a run alive in `reliability`, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, JsonValue, model_validator

from megatron_antisd.config.benchmarks import BENCHMARKS, default_path
from megatron_antisd.config.reliability import CheckpointConfig, HealthConfig, SupervisionConfig
from megatron_antisd.config.rollout import (
    AsynchronyConfig,
    CorrectionConfig,
    NoiseFloorConfig,
    RolloutConfig,
    RoutingConfig,
    ServersConfig,
    SyncConfig,
    TailsConfig,
)
from megatron_antisd.config.training import ModelConfig, OptimizerConfig, ParallelConfig, Section, TrainerConfig

DEFAULT_PRIVILEGED_TEMPLATE = (
    "{problem}\n\nYour previous attempt:\n{solution}\n\nPrevious assessment: {feedback}\n\n"
    "Now solve this problem step by step."
)


class AlgorithmConfig(Section):
    method: Literal["grpo", "sd", "antisd", "reverse_kl", "no_teacher"] = "antisd"
    """Which advantage a token gets: docs/methods.md."""
    compose: Literal["additive", "multiplicative"] = "additive"
    """How antisd's term joins A_seq; multiplicative scales it by |A_seq|."""
    lambda_max: float = Field(0.5, ge=0)
    """Weight of the token term while the gate is open."""
    clip: float = Field(0.2, gt=0, lt=1)
    """Policy-gradient ratio clip."""
    std: Literal["unbiased", "biased"] = "unbiased"
    """The group's standard deviation in A_seq."""
    zero_variance: Literal["keep", "drop"] = "keep"
    """Groups whose rewards are all equal: keep them with their token term alone, or take them out of the loss."""
    loss: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Denominator: global tokens, or tokens of the sequence then global sequences."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps per batch of rollouts (1 = on-policy; the batch is split into that many parts)."""
    shadow: bool = False
    """With `method: grpo`: run the teacher and the gate and log what AntiSD would have done; the update stays GRPO's."""


class GateConfig(Section):
    mode: Literal["teacher", "student", "always"] = "teacher"
    """What drives the gate: teacher entropy, student entropy, or nothing (g = 1 after warm-up)."""
    warmup_steps: int = Field(5, ge=1)
    """W: steps at lambda = 0 that calibrate H_warm."""
    down: float = Field(0.93, gt=0, lt=1)
    """tau_down / H_warm."""
    warm_statistic: Literal["median", "mean"] = "median"
    """How the W warm-up values become H_warm."""
    decide_after_warmup: bool = True
    """Whether step W + 1 already decides on its own H (else the gate is open for that step)."""


class PrivilegedConfig(Section):
    template: str = DEFAULT_PRIVILEGED_TEMPLATE
    """The teacher's user turn; must hold {problem}, {solution} and {feedback} once each."""
    correct: str = "Your answer is correct."
    """Feedback on a rollout that is right."""
    incorrect: str = "Your answer is incorrect."
    """Feedback on a rollout that is not."""
    solution_tokens: int = Field(8192, ge=1)
    """Upper bound on the shown solution; its beginning is cut, its end stays."""
    minimum_solution_tokens: int = Field(1, ge=1)
    """Where fewer would fit, the rollout has no teacher (counted)."""
    strip_thinking: bool = True
    """Take <think>...</think> out of the shown solution."""


class DataConfig(Section):
    train: tuple[str, ...] = ()
    """JSON-lines or Parquet files of problems; at least one, but for an evaluation alone."""
    prompt_template: str = "{problem}"
    """The student's user turn; must hold {problem} once."""
    system_prompt: str | None = None
    """System turn before every prompt."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed to the tokenizer's chat template (enable_thinking, say)."""
    shuffle: bool = True
    """A new order each epoch, from run.seed."""


class GradingConfig(Section):
    workers: int = Field(2, ge=1)
    """Grader processes of each rank."""
    timeout_seconds: float = Field(5.0, gt=0)
    """Wall clock of one answer; then its worker is killed and the answer scores 0, counted."""
    memory_bytes: int | None = Field(4 << 30, ge=1 << 28)
    """Address space of a grader process; None sets no limit (a function that loads CUDA reserves far more than it uses)."""
    function: str | None = None
    """Dotted path `package.module:function(response, answer) -> float` instead of the project's graders; it may return (float, feedback) too."""
    code_seconds: float = Field(60.0, gt=0)
    """Wall clock of one program over all its tests; those it has not passed by then count as failed."""
    case_seconds: float = Field(5.0, gt=0)
    """Wall clock of one test of a program; after the third that takes longer the rest is not tried and counts as failed."""
    code_memory_bytes: int = Field(1 << 30, ge=1 << 27)
    """Address space of a program."""
    sandbox: Literal["auto", "bubblewrap", "builtin", "limits"] = "auto"
    """Where programs run: bubblewrap's namespaces, the project's own, or resource limits alone; `auto` takes the first that works here."""
    allow_weak_sandbox: bool = False
    """Accept `limits`, under which a program can read and write what its user can."""
    max_rebuilds: int = Field(3, ge=0)
    """Times that a rank's grader processes are all started anew, in the life of this process, since they died again and again; then the run ends."""


class BenchmarkConfig(Section):
    name: str = Field(pattern=r"^[\w.+-]+$")
    """Names its metrics (eval/<name>/...) and its files. A registered one (docs/evaluation.md) needs no path and has the paper's samples."""
    path: str
    """JSON-lines or Parquet file of problems; for a registered name data/<name>.jsonl, where tools/prepare_data.py puts it."""
    samples: int = Field(1, ge=1)
    """k of avg@k; pass@j is reported for j = 1..k. For a registered name the paper's number."""

    @model_validator(mode="before")
    @classmethod
    def _registered(cls, values: Any) -> Any:
        """What a registered name says where nothing else is given."""
        known = BENCHMARKS.get(values.get("name")) if isinstance(values, dict) else None
        if known is not None:
            return {"path": default_path(values["name"]), "samples": known.samples, **values}
        if isinstance(values, dict) and "name" in values and "path" not in values:
            raise ValueError(f"{values['name']!r} is not a registered benchmark ({', '.join(BENCHMARKS)}), so it needs a path")
        return values


class EvaluationConfig(Section):
    every: int = Field(10, ge=1)
    """Steps between evaluations; step 0 and the last are always evaluated."""
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """What is evaluated; each with name, path and samples."""
    temperature: float = Field(0.7, gt=0)
    """Sampling temperature of evaluations."""
    top_p: float = Field(0.95, gt=0, le=1)
    """Nucleus of evaluations."""
    max_new_tokens: int | None = Field(None, ge=1)
    """None takes rollout.max_new_tokens."""
    samples_at_once: int = Field(2048, ge=1)
    """Samples between two writes to the disk: what an interruption costs at most. Far above what the engine decodes at once."""


class DebugConfig(Section):
    save_rollouts: str | None = None
    """Directory: one file of graded rollouts a step."""
    load_rollouts: str | None = None
    """Directory written by save_rollouts: train on those instead of generating."""


class LoggingConfig(Section):
    tensorboard: bool = True
    """Mirror the metrics to TensorBoard files."""
    wandb_project: str | None = None
    """Mirror the metrics to this W&B project."""
    progress: bool = True
    """Show a live progress bar."""
    samples_per_evaluation: int = Field(2, ge=0)
    """Decoded rollouts of each benchmark written to samples.jsonl at each evaluation."""
    rollout_groups: int = Field(4, ge=0)
    """Groups whose rollouts, teacher prompts and per-token log-probs are written to `rollouts/` at evaluation steps, for the u-lens and the audit."""
    token_kinds: str | None = None
    """Dotted path `package.module:function(problem, response_words) -> list[str]` that names the role of each space-separated word of
    a response; at evaluation steps the mean u of each role goes to token_u.jsonl. None groups by token."""


class ProfileConfig(Section):
    steps: tuple[int, ...] = ()
    """Steps of which every rank writes a torch profiler trace ([3, 5], say); other steps pay nothing."""
    directory: str | None = None
    """None takes `profile` in the run directory."""
    shapes: bool = False
    """Write the operators' input shapes into the trace."""
    stack: bool = False
    """Write Python's call stacks into the trace: several times as large and slow."""
    memory: bool = False
    """Write allocations and frees into the trace."""


class RunSection(Section):
    name: str = "run"
    """Names the run and, by default, its directory."""
    directory: str | None = None
    """None takes runs/<name>."""
    steps: int = Field(200, ge=1)
    """Training steps."""
    seed: int = Field(0, ge=0)
    """Of data order, rollouts and peer choice."""


class RunConfig(Section):
    """The whole run."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    gate: GateConfig = GateConfig()
    privileged: PrivilegedConfig = PrivilegedConfig()
    rollout: RolloutConfig = RolloutConfig()
    routing: RoutingConfig = RoutingConfig()
    correction: CorrectionConfig = CorrectionConfig()
    noise_floor: NoiseFloorConfig = NoiseFloorConfig()
    tails: TailsConfig = TailsConfig()
    sync: SyncConfig = SyncConfig()
    servers: ServersConfig = ServersConfig()
    asynchrony: AsynchronyConfig = AsynchronyConfig()
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    grading: GradingConfig = GradingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def directory(self) -> Path:
        return Path(self.run.directory or Path("runs") / self.run.name)

    @property
    def collective_seconds(self) -> int:
        """Time-out of collectives in a supervised run: longer than every stage's, or the ranks that wait would fail before the stage's time-out
        names the one they wait for."""
        return max(self.parallel.timeout_seconds, math.ceil(self.supervision.longest_stage) + 60)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher pass runs at all."""
        return self.algorithm.method not in ("grpo", "no_teacher") or self.algorithm.shadow

    @property
    def correction_mode(self) -> Literal["off", "truncate", "mask"]:
        """What `correction.mode` comes to: `auto` truncates where the engine's distribution cannot be the trainer's."""
        mode = self.correction.mode
        if mode == "auto":
            return "truncate" if self.model.dtype == "bfloat16" or self.asynchrony.max_staleness > 0 else "off"
        return mode

    def problems_drawn(self, wanted: int) -> int:
        """Problems whose groups are started where `wanted` complete ones are needed: more where `tails.oversample` is above 1."""
        return math.ceil(wanted * self.tails.oversample - 1e-9)

    @model_validator(mode="after")
    def _rules(self) -> RunConfig:
        for where, template, fields in (
            ("privileged.template", self.privileged.template, ("{problem}", "{solution}", "{feedback}")),
            ("data.prompt_template", self.data.prompt_template, ("{problem}",)),
        ):
            for field in fields:
                if template.count(field) != 1:
                    raise ValueError(f"{where} must hold {field} exactly once; it holds it {template.count(field)} times")
        if self.algorithm.shadow and self.algorithm.method != "grpo":
            raise ValueError(f"algorithm.shadow needs algorithm.method=grpo, got {self.algorithm.method}")
        if self.algorithm.compose == "multiplicative" and self.algorithm.method != "antisd":
            raise ValueError(f"algorithm.compose=multiplicative needs algorithm.method=antisd, got {self.algorithm.method}")
        if self.rollout.stall_seconds >= self.supervision.generate_seconds:
            raise ValueError(f"rollout.stall_seconds={self.rollout.stall_seconds:g} must be less than supervision.generate_seconds="
                             f"{self.supervision.generate_seconds:g}: the stage's time-out would come before the engine's restart")
        names = [b.name for b in self.evaluation.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation.benchmarks: names must differ, got {names}")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise ValueError(f"optimizer.betas must lie from 0 to below 1, got {list(self.optimizer.betas)}")
        if self.rollout.problems_per_step % self.algorithm.updates_per_batch:
            raise ValueError(f"rollout.problems_per_step={self.rollout.problems_per_step} must be divisible by "
                             f"algorithm.updates_per_batch={self.algorithm.updates_per_batch}")
        return self
