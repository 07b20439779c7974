"""Every configuration key: its type, default and meaning stand here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_PRIVILEGED_TEMPLATE = (
    "{problem}\n\nYour previous attempt:\n{solution}\n\nPrevious assessment: {feedback}\n\n"
    "Now solve this problem step by step."
)


class ConfigError(ValueError):
    """The configuration cannot run; the message names the key, the rule and what was given."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(Section):
    path: str
    """Directory of a Hugging Face checkpoint (config.json, safetensors, tokenizer), or of one of this project's checkpoints."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of trainer and engine. Main weights, gradients and log-probs are fp32 in any case."""
    spec: Literal["local", "te"] = "local"
    """Layer implementation: `local` is torch only, `te` takes transformer-engine's layers."""
    grouped_experts: Literal["auto", "grouped", "sequential"] = "auto"
    """All experts in one product (torch's `grouped_mm`) or one after the other; `auto` groups on GPUs in bfloat16. With `spec: local` alone."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes anew instead of keeping them: none, those of `recompute_modules`, or of whole layers."""
    recompute_modules: tuple[Literal["attention", "mlp", "norms"], ...] | None = Field(None, min_length=1)
    """With `recompute: selective`: the core attention (None means it alone), the whole MLP or mixture-of-experts part, the two norms of a layer."""


class ParallelConfig(Section):
    tensor_parallel_size: int = Field(1, ge=1)
    """TP. With TP > 1 sequence parallelism is on."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """PP."""
    virtual_pipeline_size: int = Field(1, ge=1)
    """VPP: chunks of layers of each pipeline stage, which take turns (the interleaved schedule); needs PP > 1."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each of the PP x VPP chunks, in the model's order; None divides as evenly as it goes, the first chunks taking the rest."""
    context_parallel_size: int = Field(1, ge=1)
    """CP: ranks that share the tokens of a row."""
    expert_parallel_size: int = Field(1, ge=1)
    """EP."""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """ETP: tensor parallelism inside an expert; independent of TP."""
    distributed_optimizer: bool = True
    """Shard main weights and moments over data- and context-parallel ranks."""
    overlap_gradients: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass of the last micro-batch still runs, bucket by bucket."""
    gradient_bucket_parameters: int | None = Field(None, ge=1)
    """With `overlap_gradients`: parameters in a bucket; None takes Megatron's 40 million, or a million a data-parallel rank where that is more."""
    timeout_seconds: int = Field(600, ge=10)
    """Time-out of collectives, and of a rank's wait for the slowest one in the rollout engine; Megatron's groups round it up to minutes."""

    def chunk_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each of the PP x VPP chunks of a model of `layers`, in the model's order: chunk i stands on stage i modulo PP."""
        if self.pipeline_layers is not None:
            return self.pipeline_layers
        chunks = self.pipeline_parallel_size * self.virtual_pipeline_size
        return tuple(layers // chunks + (i < layers % chunks) for i in range(chunks))


class OptimizerConfig(Section):
    backend: Literal["torch", "te", "apex"] = "torch"
    """Whose AdamW: an error where the package is absent, never a silent substitute."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; one-dimensional parameters are spared."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator term."""
    offload: bool = False
    """Keep AdamW's moments in host memory; they pass through the GPU parameter by parameter. With `backend: torch` alone."""
    clip_grad: float = Field(1.0, gt=0)
    """Global gradient norm bound."""
    warmup_steps: int = Field(0, ge=0)
    """Linear learning-rate warm-up, then constant."""
    max_skipped_in_a_row: int = Field(3, ge=1)
    """Updates with a non-finite loss or gradient are skipped; after this many in a row the run stops."""


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
    train: tuple[str, ...] = Field(min_length=1)
    """JSON-lines or Parquet files of problems."""
    prompt_template: str = "{problem}"
    """The student's user turn; must hold {problem} once."""
    system_prompt: str | None = None
    """System turn before every prompt."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the tokenizer's chat template (enable_thinking, say)."""
    shuffle: bool = True
    """A new order each epoch, from run.seed."""


class RolloutConfig(Section):
    engine: Literal["vllm", "megatron"] = "vllm"
    """Who generates: vLLM, or the training model itself."""
    problems_per_step: int = Field(32, ge=1)
    """Problems drawn a step."""
    group_size: int = Field(8, ge=2)
    """G. One rollout has no group to compare with, so at least 2."""
    max_new_tokens: int = Field(8192, ge=1)
    """Longest response; one that meets it is truncated."""
    max_context: int | None = Field(None, ge=2)
    """Prompt + response bound; None takes the model's."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature in training; scores use it too."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus in training. Below 1 the engine's log-probs are over the nucleus, the trainer's are not."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Engine TP; the rest of the world is replicas."""
    max_sequences: int = Field(256, ge=1)
    """Sequences an engine replica decodes at once."""
    memory_fraction: float = Field(0.45, gt=0, lt=1)
    """GPU memory share of the engine."""
    kv_cache_bytes: int | None = Field(None, ge=1 << 20)
    """Fixed KV cache size instead of a share; on CPU 256 MiB when unset."""
    sync_bucket_bytes: int = Field(512 << 20, ge=1 << 10)
    """Weights on their way to the engine at once: what a rank holds beside its shards during a sync (a larger tensor goes alone)."""
    ignore_eos: bool = False
    """Decode every response to `max_new_tokens`: for benchmarks with fixed lengths."""
    probe_max_mean: float | None = Field(None, gt=0)
    """Largest mean |engine - trainer log-prob| the probe after a weight sync accepts; None takes 1e-4 in float32, 0.1 in bfloat16."""


class TrainerConfig(Section):
    micro_batch_tokens: int = Field(16384, ge=1)
    """Upper bound of packed tokens in a micro-batch, over all context-parallel ranks (a longer single sequence is its own micro-batch)."""
    score_micro_batch_tokens: int = Field(32768, ge=1)
    """The same for scoring without gradient."""
    vocab_chunk_bytes: int = Field(512 << 20, ge=1)
    """fp32 logits that exist at once on a rank in the training step's output layer, at least one token's: 4 x vocabulary / TP bytes. Scoring
    without gradient holds a few MB of them, whatever this says."""
    vocab_kernels: Literal["torch", "triton"] = "torch"
    """Who works on logits between the products: torch's operators, or two Triton kernels (GPUs only; not measured yet, so not the default)."""


class GradingConfig(Section):
    workers: int = Field(2, ge=1)
    """Grader processes of each rank."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Wall clock of one answer; then its worker is killed and the answer scores 0, counted."""
    function: str | None = None
    """Dotted path `package.module:function(response, answer) -> float` instead of the math grader."""


class BenchmarkConfig(Section):
    name: str
    """Names its metrics: eval/<name>/..."""
    path: str
    """JSON-lines or Parquet file of problems."""
    samples: int = Field(1, ge=1)
    """k of avg@k; pass@k is reported for 1, 2, 4, ... samples."""


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


class CheckpointConfig(Section):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step is saved whenever this is set."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    resume: bool = True
    """Continue from the newest checkpoint in the run directory."""
    continual_from: str | None = None
    """A run directory or checkpoint of another method to start from: weights, optimizer, data position; the gate is calibrated anew."""
    save_hf: bool = True
    """Write the final policy as a Hugging Face checkpoint under `hf/`."""


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
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    gate: GateConfig = GateConfig()
    privileged: PrivilegedConfig = PrivilegedConfig()
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    grading: GradingConfig = GradingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    debug: DebugConfig = DebugConfig()

    @property
    def directory(self) -> Path:
        return Path(self.run.directory or Path("runs") / self.run.name)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher pass runs at all."""
        return self.algorithm.method not in ("grpo", "no_teacher") or self.algorithm.shadow

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
        names = [b.name for b in self.evaluation.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"evaluation.benchmarks: names must differ, got {names}")
        if self.rollout.problems_per_step % self.algorithm.updates_per_batch:
            raise ValueError(f"rollout.problems_per_step={self.rollout.problems_per_step} must be divisible by "
                             f"algorithm.updates_per_batch={self.algorithm.updates_per_batch}")
        return self
