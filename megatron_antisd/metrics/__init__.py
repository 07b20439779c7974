"""What a run reports: metrics.jsonl and its mirrors (TensorBoard, W&B, console), sample rollouts, stage times, profiler traces.

Steps count from 1: step `s` is the s-th policy update. An evaluation at step `s` is of the policy after `s` updates, so step 0 is
the untrained policy. Training and evaluation of one step are two lines of metrics.jsonl, `{"step": s, "reward_mean": ...}` and
`{"step": s, "eval/<benchmark>/avg@k": ...}`; `read_metrics` merges them.

For a resumed run to write what an uninterrupted one writes, the loop does in this order: `log(s)`, the checkpoint of step `s`, `log_samples(s)`,
`log_evaluation(s)`; a resume from it passes `resume_step = s + 1`, and makes up for the evaluation of `s` where `has_evaluation(s)` is false.
Only one rank writes; on the others every method does nothing.
"""

from megatron_antisd.metrics.files import MetricsError, read_metrics, read_rows
from megatron_antisd.metrics.profile import StepProfiler
from megatron_antisd.metrics.stages import STAGES, StageTimer
from megatron_antisd.metrics.writer import SAMPLE_KEYS, STEP_KEYS, TOKEN_U_KEYS, MetricsWriter

__all__ = [
    "SAMPLE_KEYS",
    "STAGES",
    "STEP_KEYS",
    "TOKEN_U_KEYS",
    "MetricsError",
    "MetricsWriter",
    "StageTimer",
    "StepProfiler",
    "read_metrics",
    "read_rows",
]
