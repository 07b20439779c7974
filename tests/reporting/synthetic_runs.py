"""Run directories made by the real writer from curves with known values."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_antisd.config import LoggingConfig, build_config, dump_config
from megatron_antisd.metrics import STEP_KEYS, MetricsWriter

QUIET = LoggingConfig(tensorboard=False, progress=False)
WARM, DOWN = 0.2, 0.186


def training_row(step: int, **changes: Any) -> dict[str, Any]:
    """A complete row of a run without a teacher."""
    row: dict[str, Any] = dict.fromkeys(STEP_KEYS[1:], None)
    row |= {
        "reward_mean": 0.1 + 0.01 * step, "reward_completed_mean": 0.12 + 0.01 * step, "response_length_mean": 5.0 + step,
        "truncation_rate": 0.05, "student_entropy_mean": 0.8, "lambda": 0.0, "loss": -0.01, "grad_norm": 0.5, "clip_fraction": 0.0,
        "mismatch_kl": 1e-6, "mismatch_max": 1e-4 * step, "tokens": 64 * (5 + step), "tokens_per_second": 500.0,
        "seconds_total": 4.0, "seconds_generate": 2.0, "seconds_grade": 0.25, "seconds_step": 1.25, "seconds_sync": 0.25,
    }  # fmt: skip
    return row | changes


def teacher_row(step: int, entropy: float, is_open: bool, **changes: Any) -> dict[str, Any]:
    calibrated = step > 5
    return training_row(step) | {
        "teacher_entropy_median": entropy, "gate_open": is_open, "gate_warm": WARM if calibrated else None,
        "gate_down": DOWN if calibrated else None, "lambda": 0.5 if is_open else 0.0, "u_mean": -0.2, "u_negative_share": 0.6,
        "phi_bound_share": 0.01, "seconds_teacher": 0.5, **changes,
    }  # fmt: skip


def write_run(
    directory: Path, *, method: str = "antisd", seed: int = 0, base: str = "models/base-0", accuracy: dict[int, float], steps: int = 40,
    noise: float = 0.0, evaluations: dict[int, dict[str, float]] | None = None, **algorithm: Any,
) -> Path:  # fmt: skip
    """`accuracy`: step -> eval/search/avg@1. `evaluations`: step -> further metrics, or all where `accuracy` is empty.

    The gate warms up in steps 1-5, is open 6-20 and 31-, closed 21-30.
    """
    raw = {
        "run": {"name": directory.name, "steps": steps, "seed": seed}, "model": {"path": base}, "data": {"train": ["train.jsonl"]},
        "algorithm": {"method": method, **algorithm},
    }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(build_config(raw)))
    random = np.random.default_rng(seed)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with (
        quiet,
        MetricsWriter(directory, config=QUIET, total_steps=steps, resume_step=None, run_name=directory.name, is_writer=True) as writer,
    ):
        for step in range(steps + 1):
            if step > 0:
                writer.log(step, _row(step, method, random, noise))
            if evaluations and step in evaluations:
                writer.log_evaluation(step, evaluations[step])
            elif step in accuracy:
                writer.log_evaluation(step, {"eval/search/avg@1": accuracy[step], "eval/search/pass@1": accuracy[step]})
                if step in (min(accuracy), max(accuracy)):
                    writer.log_samples(step, _samples(step))
                    writer.log_token_u(step, [{"kind": "WAIT", "mean_u": -1.25 - step / 100, "count": 40},
                                              {"kind": "ANS", "mean_u": 0.14, "count": 12}])  # fmt: skip
    return directory


def _row(step: int, method: str, random: np.random.Generator, noise: float) -> dict[str, Any]:
    wobble = {"reward_mean": 0.1 + 0.6 / (1 + math.exp((20 - step) / 6)) + noise * random.normal(),
              "response_length_mean": 5 + 40 / (1 + math.exp((18 - step) / 5)) + 20 * noise * random.normal(),
              "truncation_rate": min(1.0, abs(0.05 + noise * random.normal()))}  # fmt: skip
    wobble["reward_completed_mean"] = wobble["reward_mean"] + 0.03
    if method == "grpo":
        return training_row(step, **wobble)
    closed = 21 <= step <= 30
    entropy = (0.17 if closed else 0.21) + 0.2 * noise * random.normal()
    u = {"u_mean": -0.2 + noise * random.normal(), "u_negative_share": 0.6 + noise * random.normal()}
    return teacher_row(step, entropy, step > 5 and not closed, **wobble, **u)


def _samples(step: int) -> list[dict[str, Any]]:
    return [
        {
            "problem_id": "p-7",
            "prompt": "Q 1 2 3 A",
            "response": f"ANS 3 EOS from step {step}",
            "reward": float(step > 0),
            "truncated": False,
        },
        {"problem_id": "p-9", "prompt": "Q 4 5 6 A", "response": "TRY 5", "reward": 0.0, "truncated": True},
    ]
