"""What may differ between a run's configuration and that of the checkpoint it goes on from. Pure: two configurations in, differences out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_antisd.config.rollout_rules import routing_replay
from megatron_antisd.config.schema import RunConfig
from megatron_antisd.config.training import ConfigError

FREE = (
    "run.name", "run.directory", "run.steps", "model.path", "model.spec", "model.grouped_experts", "model.recompute", "model.recompute_modules",
    "parallel", "rollout.engine", "rollout.tensor_parallel_size", "rollout.expert_parallel", "rollout.memory_fraction", "rollout.kv_cache_bytes",
    "rollout.max_sequences", "rollout.mode", "rollout.sync_bucket_bytes", "rollout.probe_max_mean", "rollout.max_restarts", "rollout.stall_seconds",
    "sync", "servers", "noise_floor", "routing.sample_every", "routing.sample_rollouts", "trainer", "optimizer.backend",
    "optimizer.offload", "optimizer.max_skipped_in_a_row", "grading.workers", "grading.max_rebuilds", "evaluation", "checkpoint", "supervision",
    "health", "logging", "profile", "debug.save_rollouts",
)  # fmt: skip
"""Keys and sections that change where and how a run computes, or what is watched and written, but not what is trained beyond rounding. The weights
are the checkpoint's whatever `model.path` says, and are held against that model."""

NEVER = ("algorithm.method", "gate")
"""What the checkpoint's own state belongs to."""


def check_changes(before: Mapping[str, Any], now: RunConfig, checkpoint: str, *, moe: bool) -> list[str]:
    """The allowed differences, one readable line each. `before`: the configuration that wrote `checkpoint`, as plain values; empty where it is lost:
    nothing is compared then. A key that it lacks, since an earlier release wrote it, counts with its default. `moe`: a mixture of experts.

    Raises ConfigError, listing all of them, where some change what is trained and `checkpoint.accept_changes` does not name them."""
    if not before:
        return []
    defaults = RunConfig.model_validate({"model": {"path": now.model.path}}).model_dump(mode="json")
    changes = dict(_differences(before, now.model_dump(mode="json"), defaults, "")) | dict(_resolved_differences(before, now, moe=moe))
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


def _differences(before: Any, now: Any, default: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, "old -> new"); sections are gone into."""
    if isinstance(before, Mapping) and isinstance(now, Mapping) and key not in _MAPPINGS:
        for name in now:
            own = default.get(name) if isinstance(default, Mapping) else None
            yield from _differences(before.get(name, own), now[name], own, f"{key}.{name}" if key else name)
    elif before != now and key not in _RESOLVED:
        yield key, f"{before!r} -> {now!r}"


def _resolved_differences(before: Mapping[str, Any], now: RunConfig, *, moe: bool) -> Iterator[tuple[str, str]]:
    """Of the keys whose `auto` comes to something else where other keys change."""
    then = now.model_copy(update={
        section: getattr(now, section).model_copy(update={key: before.get(section, {}).get(key, absent)})
        for section, key, absent in (("model", "dtype", now.model.dtype), ("rollout", "engine", now.rollout.engine),
                                     ("asynchrony", "max_staleness", 0), ("routing", "replay", "off"), ("correction", "mode", "off"))})
    for key, old, new in (("routing.replay", routing_replay(then, moe=moe), routing_replay(now, moe=moe)),
                          ("correction.mode", then.correction_mode, now.correction_mode)):
        if old != new:
            yield key, f"{old!r} -> {new!r}"


_RESOLVED = ("routing.replay", "correction.mode")
"""Compared by what they come to. Releases that did not know them had neither."""
_MAPPINGS = ("data.chat_template_kwargs",)
"""Keys whose value is a mapping, not a section."""


def _covers(keys: Sequence[str], key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in keys)
