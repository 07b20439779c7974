"""Which checkpoints are kept: pure arithmetic over steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from megatron_antisd.config import CheckpointConfig


def superseded(steps: Collection[int], newest: int, scores: Mapping[int, float], settings: CheckpointConfig) -> list[int]:
    """Of the checkpoints of `steps`, those that may go once `newest` is whole. `scores`: what `best_metric` was at evaluated steps.

    Kept are the newest `keep` up to `newest` itself, the `keep_best` highest scores (of equals the later one), and steps that `keep_every`
    divides. Steps behind `newest` are another history's and no business of this one."""
    mine = sorted(step for step in steps if step <= newest)
    kept = {newest, *mine[-settings.keep :]}
    if settings.keep_every is not None:
        kept |= {step for step in mine if step % settings.keep_every == 0}
    scored = sorted((step for step in mine if step in scores), key=lambda step: (scores[step], step))
    kept |= set(scored[max(0, len(scored) - settings.keep_best) :])
    return [step for step in mine if step not in kept]
