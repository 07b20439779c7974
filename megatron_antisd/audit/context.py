"""The teacher's prompt read back: is it what Algorithm 1 asks for?

The prompts are judged by their decoded text, not by the code that built them: question, feedback and generation prompt must be whole, the
solution must be the one the view names, and both roles' prompts must end alike, or the thinking boundary is not the same for both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_antisd.data import PromptBuilder, feedback_for
from megatron_antisd.data.templates import CORRECT_REWARD
from megatron_antisd.records import Problem, Rollout, ScoredGroup, ScoredRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_START, THINKING_END = "<think>", "</think>"
LONG_TEXT = 40
"""Characters below which a text may well stand in a prompt by chance (an answer that the question names)."""


@dataclass(frozen=True, kw_only=True)
class ContextFindings:
    """What one rollout's teacher saw."""

    problem_id: str
    index: int
    source: str
    """`peer`, `reference`, `no_solution` or `no_room`."""
    shown_index: int | None
    prompt: str | None
    """The teacher's prompt with its special tokens; None without a teacher."""
    prompt_tokens: int
    response_tokens: int
    cut_tokens: int
    """Of the solution's beginning."""
    student_thinking: str
    """Where thinking begins for the student: `thinking_boundary` of its prompt."""
    teacher_thinking: str
    response_thinking_end: int | None
    """The response token that completes `</think>`; None where the response holds none."""
    defects: tuple[str, ...]
    """What must never be; each a sentence."""


class ContextInspector:
    """Reads the prompts of one run. `prompts` says what a question is, `tokenizer` turns ids into text."""

    def __init__(self, prompts: PromptBuilder, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prompts, self._tokenizer = prompts, tokenizer
        self._as_decoded = functools.lru_cache(maxsize=256)(self._decoded_again)  # a group's rollouts share question and feedback

    def inspect(self, group: ScoredGroup) -> list[ContextFindings]:
        """Findings of every rollout of a group, in order."""
        texts: dict[tuple[int, ...], str] = {}  # most rollouts of a group share a prompt
        for scored in group.rollouts:
            for ids in (scored.rollout.prompt_ids, scored.privileged.view.prompt_ids if scored.privileged.view else ()):
                texts.setdefault(ids, self._decode(ids))
        return [self._findings(scored, group, texts) for scored in group.rollouts]

    def _findings(self, scored: ScoredRollout, group: ScoredGroup, texts: dict[tuple[int, ...], str]) -> ContextFindings:
        rollout, privileged = scored.rollout, scored.privileged
        student, question = _squeeze(texts[rollout.prompt_ids]), self._as_decoded(self._prompts.question(group.problem))
        defects = [] if question in student else ["the student's prompt does not hold the whole question"]
        ending = student.rpartition(question)[2]
        prompt = teacher_thinking = None
        if privileged.view is not None:
            prompt = texts[privileged.view.prompt_ids]
            teacher = _squeeze(prompt)
            teacher_thinking = thinking_boundary(teacher[-len(ending):] if ending else "")
            if privileged.view.response_ids != rollout.response_ids:
                defects.append("the teacher scored other response tokens than the student wrote")
            defects += self._prompt_defects(teacher, ending, question, feedback_for(rollout))
            defects += self._solution_defects(scored, group, teacher)
        return ContextFindings(
            problem_id=rollout.problem_id, index=rollout.index, source=privileged.source, shown_index=privileged.shown_index, prompt=prompt,
            prompt_tokens=len(privileged.view.prompt_ids) if privileged.view else 0, response_tokens=len(rollout.response_ids),
            cut_tokens=privileged.cut_tokens, student_thinking=thinking_boundary(ending), teacher_thinking=teacher_thinking or "no teacher",
            response_thinking_end=self._thinking_end(rollout), defects=tuple(defects))

    def _prompt_defects(self, teacher: str, ending: str, question: str, feedback: str) -> list[str]:
        defects = []
        if question not in teacher:
            defects.append("the teacher's prompt does not hold the whole question")
        if self._as_decoded(feedback) not in teacher:
            defects.append(f"the teacher's prompt does not hold this rollout's feedback {feedback!r}")
        if not teacher.endswith(ending):
            defects.append(f"the teacher's prompt ends on {teacher[-40:]!r}, the student's on {ending!r}: the generation prompt is not the same")
        return defects

    def _solution_defects(self, scored: ScoredRollout, group: ScoredGroup, teacher: str) -> list[str]:
        rollout, privileged = scored.rollout, scored.privileged
        peer = self._peer(scored, group)
        if privileged.shown_index == rollout.index:
            return ["the rollout was shown itself"]
        if privileged.source == "peer" and peer is None:
            return [f"the shown rollout {privileged.shown_index} is not in the group"]
        shown = self._shown_text(group.problem, peer)
        defects = []
        if not self._holds(teacher, shown, privileged.cut_tokens):
            defects.append(f"the teacher's prompt does not hold the solution ({privileged.source})")
        if peer is not None and (peer.reward is None or peer.reward < CORRECT_REWARD):
            defects.append(f"the shown rollout {peer.index} has reward {peer.reward}: no verified solution")
        if peer is not None and peer.truncated:
            defects.append(f"the shown rollout {peer.index} was truncated")
        own = _squeeze(self._prompts.clean(rollout.text))
        # A peer may have written the very same tokens; that is its text, not this rollout's.
        if len(own) > LONG_TEXT and own in teacher and own not in shown:
            defects.append("the rollout's own text stands in its teacher's prompt")
        return defects

    def _shown_text(self, problem: Problem, peer: Rollout | None) -> str:
        """Squeezed. A peer's text is decoded tokens already."""
        if peer is not None:
            return _squeeze(self._prompts.clean(peer.text))
        return self._as_decoded(self._prompts.clean(problem.solution or ""))

    @staticmethod
    def _peer(scored: ScoredRollout, group: ScoredGroup) -> Rollout | None:
        return next((s.rollout for s in group.rollouts if s.rollout.index == scored.privileged.shown_index), None)

    @staticmethod
    def _holds(teacher: str, shown: str, cut_tokens: int) -> bool:
        """Whether the whole solution, or its end where its beginning was cut, stands in the prompt."""
        return bool(shown) and (shown[-1:] if cut_tokens else shown) in teacher

    def _thinking_end(self, rollout: Rollout) -> int | None:
        if THINKING_END not in rollout.text:  # decoding tokens one by one is slow
            return None
        text = ""
        for position, token in enumerate(rollout.response_ids):
            text = text[-len(THINKING_END):] + self._decode((token,))
            if THINKING_END in text:
                return position
        return None

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _decoded_again(self, text: str) -> str:
        """A text as the tokenizer gives it back (some normalise Unicode), squeezed."""
        return _squeeze(self._decode(self._tokenizer(text, add_special_tokens=False)["input_ids"]))


def _squeeze(text: str) -> str:
    """Without white space: a text tokenised alone may come back with other spaces at its ends, or between words."""
    return "".join(text.split())


def thinking_boundary(ending: str) -> str:
    """How a prompt leaves the thinking segment, from what follows the question."""
    if THINKING_END in ending:
        return "closed by the prompt (an empty thinking block)"
    if THINKING_START in ending:
        return "opened by the prompt"
    return "left to the response"
