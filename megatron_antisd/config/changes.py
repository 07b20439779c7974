"""What may differ between a run's configuration and that of the checkpoint it goes on from. Pure: two configurations in, differences out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_antisd.config.schema import RunConfig
from megatron_antisd.config.training import ConfigError

FREE = (
    "run.name", "run.directory", "run.steps", "model.path", "model.spec", "model.grouped_experts", "model.recompute", "model.recompute_modules",
    "parallel", "rollout.engine", "rollout.tensor_parallel_size", "rollout.memory_fraction", "rollout.kv_cache_bytes", "rollout.max_sequences",
    "rollout.mode", "rollout.sync_bucket_bytes", "rollout.probe_max_mean", "rollout.max_restarts", "rollout.stall_seconds",
    "sync", "servers", "noise_floor", "routing.sample_every", "routing.sample_rollouts", "trainer", "optimizer.backend",
    "optimizer.offload", "optimizer.max_skipped_in_a_row", "grading.workers", "grading.max_rebuilds", "evaluation", "checkpoint", "supervision",
    "health", "logging", "profile", "debug.save_rollouts",
)  # fmt: skip
"""Keys and sections that change where and how a run computes, or what is watched and written, but not what is trained beyond rounding. The weights
are the checkpoint's whatever `model.path` says, and are held against that model."""

NEVER = ("algorithm.method", "gate")
"""What the checkpoint's own state belongs to."""


def check_changes(before: Mapping[str, Any], now: RunConfig, checkpoint: str) -> list[str]:
    """The allowed differences, one readable line each. `before`: the configuration that wrote `checkpoint`, as plain values.

    Raises ConfigError, listing all of them, where some change what is trained and `checkpoint.accept_changes` does not name them."""
    changes = dict(_differences(before, now.model_dump(mode="json"), ""))
    accepted = now.checkpoint.accept_changes
    never = [key for key in changes if _covers(NEVER, key)]
    refused = [key for key in changes if key not in never and not _covers(FREE, key) and not _covers(accepted, key)]
    if not never and not refused:
        return [f"{key}: {change}" for key, change in changes.items()]
    lines = [f"checkpoint.resume: the configuration changes what {checkpoint} was trained with:"]
    lines += [f"{key}: {changes[key]}" for key in (*never, *refused)]
    if never:
        lines.append(f"{', '.join(never)} cannot change within a run: use another run.name, with checkpoint.continual_from={now.directory} to start "
                     "from its policy")
    if refused:
        lines.append(f"take {'it' if len(refused) == 1 else 'them'} back, or accept with checkpoint.accept_changes=[{', '.join(refused)}]")
    lines.append(f"free to change are {', '.join(FREE)}")
    raise ConfigError("\n  ".join(lines))


def _differences(before: Any, now: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, "old -> new"); sections are gone into. A key that the older version did not know is no difference: it has its default."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and key not in _MAPPINGS:
        for name in now:
            if name in before:
                yield from _differences(before[name], now[name], f"{key}.{name}" if key else name)
    elif before != now:
        yield key, f"{before!r} -> {now!r}"


_MAPPINGS = ("data.chat_template_kwargs",)
"""Keys whose value is a mapping, not a section."""


def _covers(keys: Sequence[str], key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)
