"""Alarms on u = log pi_T - log pi_S: figures that a sound teacher pass does not give."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_antisd.records import ScoredGroup, ScoredRollout

FIRST_TOKEN_NATS = 2.0
FIRST_TOKEN_RATIO = 4.0
FIRST_TOKEN_ROLLOUTS = 8
"""The first response token stands beside the prompt: where its mean |u| is above both bounds over as many rollouts, the two prompts
probably end differently. With fewer rollouts a single word decides."""
EMPTY_CONTEXT_NATS = {"float32": 1e-3, "bfloat16": 0.2}
"""Mean |u| of a teacher without privileged context, which is the student: rounding of two passes is all there may be."""


def first_token_alarm(scored: Sequence[ScoredRollout]) -> str | None:
    """None, or a sentence on the first token's u against that of all later ones."""
    rows = [u for u in (s.u for s in scored) if u is not None and len(u) > 1]
    if len(rows) < FIRST_TOKEN_ROLLOUTS:
        return None
    first = statistics.fmean(abs(u[0]) for u in rows)
    later = statistics.fmean(abs(value) for u in rows for value in u[1:])
    if first > FIRST_TOKEN_NATS and first > FIRST_TOKEN_RATIO * later:
        return (f"the first response token has a mean |u| of {first:.2f} nats over {len(rows)} rollouts, later ones {later:.2f}: "
                "do student and teacher prompts end alike (generation prompt, thinking block)?")
    return None


def empty_context_alarm(u: Sequence[float], dtype: str) -> str | None:
    """None, or a sentence on tokens that a teacher without privileged context scored and yet says something else of."""
    if not u:
        return None
    mean = statistics.fmean(map(abs, u))
    if mean <= EMPTY_CONTEXT_NATS[dtype]:
        return None
    return (f"with an empty context |u| is {mean:.2g} nats on average over {len(u)} tokens, expected at most {EMPTY_CONTEXT_NATS[dtype]:g}: "
            "teacher and student passes differ in more than the prompt")


def shown_solution_alarm(groups: Sequence[ScoredGroup], failing: Sequence[str]) -> str | None:
    """None, or a sentence on the problems (`failing`, their ids) whose shown solution its own grader rejects."""
    if not failing:
        return None
    return (f"in {len(failing)} of {len(groups)} groups the shown solution fails its own grader (problems {', '.join(failing[:5])}): "
            "an answer without a box, a wrong reference, or a grader that changed")
