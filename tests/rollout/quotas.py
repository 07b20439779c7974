"""What a quota and expected lengths must and must not change, for any engine; every rank calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finished import reported

from megatron_antisd.rollout.engine import Quota, Request, Sampling


def quota_facts(engine: Any, requests: Sequence[Request], sampling: Sampling, quota: Quota) -> dict[str, bool]:
    """`requests`: whole groups, more of them than the quota, with responses of different lengths."""
    size = quota.group_size
    whole = engine.generate(requests, sampling)
    expected = [replace(request, expected_tokens=None if i // size == 1 else len(whole[i].response_ids)) for i, request in enumerate(requests)]
    some = engine.generate(requests, sampling, None, quota)
    kept = {i // size for i, generation in enumerate(some) if generation is not None}
    again, told, _ = reported(lambda *arguments: engine.generate(*arguments, quota), requests, sampling)
    balanced = engine.generate(expected, sampling, None, quota)
    all_of_them = Quota(groups=len(requests) // size, group_size=size)
    return {
        "whole_groups": len(kept) == quota.groups and all((g is not None) == (i // size in kept) for i, g in enumerate(some)),
        "the_same_draws": all(g is None or g.response_ids == w.response_ids and abs(sum(g.log_probs) - sum(w.log_probs)) < 1e-3
                              for g, w in zip(some, whole, strict=True)),
        "repeatable": again == some,
        "kept_are_reported": {(i, g.response_ids) for i, g in enumerate(some) if g is not None} <= set(told),
        "expected_changes_no_draw": [g.response_ids for g in engine.generate(expected, sampling)] == [g.response_ids for g in whole],
        "balanced_quota": sum(g is not None for g in balanced) == quota.groups * size,
        "full_quota_is_none": engine.generate(requests, sampling, None, all_of_them) == whole,
        "usable_afterwards": engine.generate(requests, sampling) == whole,
    }
