"""A sample's vote for majority@k."""

from __future__ import annotations

from megatron_antisd.grading.boxes import final_answer
from megatron_antisd.records import CodeTests


def final_vote(response: str, tests: CodeTests | None) -> str | None:
    """The response's final answer as written; None where it gives none, and for programs, whose answers cannot be counted."""
    answer = None if tests is not None else final_answer(response)
    return None if answer is None else answer.joined or answer.text
