"""A sample's vote for majority@k."""

from __future__ import annotations

from megatron_antisd.grading.math import THINKING_END, _boxes


def final_answer(response: str) -> str | None:
    """The content of the last box after the thinking segment; None without one."""
    boxes = _boxes(response.rpartition(THINKING_END)[2])
    return boxes[-1].content if boxes else None
