"""The configuration keys of what keeps a run alive: sections checkpoint, supervision, health."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_antisd.config.training import Section

Action = Literal["log", "skip", "stop", "rollback"]


class CheckpointConfig(Section):
    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; the last step is saved whenever this is set."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: int = Field(0, ge=0)
    """Of the checkpoints whose step was evaluated, as many of the best are kept as well."""
    best_metric: str | None = None
    """What `keep_best` goes by, an `eval/...` key of metrics.jsonl, higher is better; None takes avg@k of the first benchmark."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints of steps that this divides are kept for good."""
    background: bool = True
    """Copy the state to host memory and write it while training goes on; false waits for the disk."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint or a row cannot be written (disk full, read-only): stop, or go on, keep rows in memory and try again at the next."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """What of a checkpoint is looked at before it is loaded: the SHA-256 of every file, or only that the files are there in their sizes."""
    resume: bool = True
    """Continue from the newest whole checkpoint in the run directory."""
    accept_changes: tuple[str, ...] = ()
    """Keys that may differ from the configuration the checkpoint was written with, although they change what is trained ([optimizer.lr], say)."""
    continual_from: str | None = None
    """A run directory or checkpoint of another method to start from: weights, optimizer, data position; the gate is calibrated anew."""
    save_hf: bool = True
    """Write the final policy as a Hugging Face checkpoint under `hf/`."""


class SupervisionConfig(Section):
    setup_seconds: float = Field(1800, gt=0)
    """Time-out of building a run: engine, model, checkpoint, first weight sync. When a stage's time is up, every rank's Python stack is printed,
    the ranks that hold the others up are named, and all processes end."""
    generate_seconds: float = Field(3600, gt=0)
    """Time-out of a step's generation."""
    grade_seconds: float = Field(1800, gt=0)
    """Time-out of what a step waits for grading."""
    teacher_seconds: float = Field(1800, gt=0)
    """Time-out of scoring under the privileged prompt, and of the student's scoring pass."""
    step_seconds: float = Field(1800, gt=0)
    """Time-out of the update."""
    sync_seconds: float = Field(900, gt=0)
    """Time-out of handing the weights to the engine, and the probe."""
    save_seconds: float = Field(1800, gt=0)
    """Time-out of a checkpoint: of copying it or, without `checkpoint.background` or when an earlier one is still being written, of writing it."""
    evaluate_seconds: float = Field(14400, gt=0)
    """Time-out of an evaluation."""
    other_seconds: float = Field(900, gt=0)
    """Time-out of every other stage."""
    heartbeat_seconds: float = Field(5.0, gt=0)
    """Seconds between the signs of life that each rank's watchdog gives."""
    silence_seconds: float = Field(120.0, gt=0)
    """A rank that gave no sign of life for so long is taken for dead or stopped, named, and the run ended; more than two heartbeats."""

    @property
    def longest_stage(self) -> float:
        """Seconds."""
        return max(getattr(self, name) for name in type(self).model_fields if name not in ("heartbeat_seconds", "silence_seconds"))

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> SupervisionConfig:
        if self.silence_seconds <= 2 * self.heartbeat_seconds:
            raise ValueError(f"supervision.silence_seconds={self.silence_seconds:g} must be more than two supervision.heartbeat_seconds="
                             f"{self.heartbeat_seconds:g}: healthy ranks would be taken for dead")
        return self


class NonFiniteConfig(Section):
    action: Literal["skip", "stop", "rollback"] = "skip"
    """When loss, gradient, entropy, a log-prob (hence u) or the mean reward is NaN or infinite. `skip` leaves the update out, `stop` ends the
    run, `rollback` goes back to the newest checkpoint and on with the problems behind those of this step. Such an update is never applied."""


class GradientSpikeConfig(Section):
    action: Action = "log"
    """When the gradient norm jumps: `log` only, or as for `non_finite`."""
    factor: float = Field(20.0, gt=1)
    """A spike is a norm above this many times the median of the `window` norms before it."""
    window: int = Field(50, ge=2)
    """Norms in that median: of updates that were applied, above 0 and no spikes. None is judged before 10 of them, or `window` where that is
    less; as many spikes in a row that were applied are a new level and no longer spikes."""


class EntropyCollapseConfig(Section):
    action: Literal["log", "stop", "rollback"] = "log"
    """When the policy draws the same tokens every time."""
    below: float = Field(0.005, ge=0)
    """Mean token entropy of the student in nats below which a step counts."""
    steps: int = Field(5, ge=1)
    """So many steps in a row are a collapse."""


class RewardCollapseConfig(Section):
    action: Literal["log", "stop", "rollback"] = "log"
    """When the reward falls and stays low."""
    share: float = Field(0.25, ge=0, lt=1)
    """A collapse is a mean reward of the last `window` steps below this share of the best such mean before; where that is not above 0, none."""
    window: int = Field(20, ge=1)
    """Steps in a mean."""


class MismatchConfig(Section):
    action: Action = "log"
    """When engine and trainer disagree on the sampled tokens' log-probs."""
    kl: float = Field(0.05, gt=0)
    """Bound of an update's `mismatch_kl`, nats."""


class AllTruncatedConfig(Section):
    action: Action = "log"
    """When (almost) no response came to an end."""
    share: float = Field(1.0, gt=0, le=1)
    """Truncated share of the batch from which on a step counts."""
    steps: int = Field(1, ge=1)
    """So many steps in a row are an incident."""


class HealthConfig(Section):
    non_finite: NonFiniteConfig = NonFiniteConfig()
    gradient_spike: GradientSpikeConfig = GradientSpikeConfig()
    entropy_collapse: EntropyCollapseConfig = EntropyCollapseConfig()
    reward_collapse: RewardCollapseConfig = RewardCollapseConfig()
    mismatch: MismatchConfig = MismatchConfig()
    all_truncated: AllTruncatedConfig = AllTruncatedConfig()
    max_rollbacks: int = Field(3, ge=0)
    """Rollbacks of a run; the next incident that asks for one stops it."""
    saved_incidents: int = Field(20, ge=0)
    """Steps whose rollouts are kept under `incidents/` for inspection, the first ones of a run."""
