"""The teacher's prompt read back: is it what Algorithm 1 asks for?

The prompts are judged by their decoded text, not by the code that built them: question, feedback and generation prompt must be whole, the
solution must be the one the view names, and both roles' prompts must end alike, or the thinking boundary is not the same for both.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_antisd.data import PromptBuilder, feedback_for
from megatron_antisd.grading.boxes import THINKING_END
from megatron_antisd.records import CORRECT_REWARD, Rollout, ScoredGroup, ScoredRollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINKING_START = "<think>"
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
    """The response token that completes `</think>`; None where the response holds none, or nobody asked."""
    defects: tuple[str, ...]
    """What must never be; each a sentence."""


class ContextInspector:
    """Reads the prompts of one run. `prompts` says what a question is, `tokenizer` turns ids into text."""

    def __init__(self, prompts: PromptBuilder, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prompts, self._tokenizer = prompts, tokenizer
        self._special = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
        # A group's rollouts share question, feedback and the solution shown.
        self._as_decoded = functools.lru_cache(maxsize=256)(self._decoded_again)
        self._as_shown = functools.lru_cache(maxsize=256)(self._cleaned_end)

    def inspect(self, group: ScoredGroup, *, thinking_end: bool = False) -> list[ContextFindings]:
        """Findings of every rollout of a group, in order. `thinking_end` looks for the token at which thinking ends, which costs most."""
        texts: dict[tuple[int, ...], str] = {}  # most rollouts of a group share a prompt
        for scored in group.rollouts:
            for ids in (scored.rollout.prompt_ids, scored.privileged.view.prompt_ids if scored.privileged.view else ()):
                if ids not in texts:
                    texts[ids] = self._decode(ids)
        return [self._findings(scored, group, texts, thinking_end) for scored in group.rollouts]

    def _findings(self, scored: ScoredRollout, group: ScoredGroup, texts: dict[tuple[int, ...], str], thinking_end: bool) -> ContextFindings:
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
            defects += self._prompt_defects(teacher, ending, question, self._prompts.without_special(feedback_for(rollout)))
            defects += self._special_defects(rollout, privileged.view.prompt_ids)
            defects += self._solution_defects(scored, group, teacher, question)
        return ContextFindings(
            problem_id=rollout.problem_id, index=rollout.index, source=privileged.source, shown_index=privileged.shown_index, prompt=prompt,
            prompt_tokens=len(privileged.view.prompt_ids) if privileged.view else 0, response_tokens=len(rollout.response_ids),
            cut_tokens=privileged.cut_tokens, student_thinking=thinking_boundary(ending), teacher_thinking=teacher_thinking or "no teacher",
            response_thinking_end=self._thinking_end(rollout) if thinking_end else None, defects=tuple(defects))

    def _prompt_defects(self, teacher: str, ending: str, question: str, feedback: str) -> list[str]:
        defects = []
        if question not in teacher:
            defects.append("the teacher's prompt does not hold the whole question")
        if self._as_decoded(feedback) not in teacher:
            defects.append(f"the teacher's prompt does not hold this rollout's feedback {feedback!r}")
        if not teacher.endswith(ending):
            defects.append(f"the teacher's prompt ends on {teacher[-40:]!r}, the student's on {ending!r}: the generation prompt is not the same")
        return defects

    def _special_defects(self, rollout: Rollout, teacher_ids: Sequence[int]) -> list[str]:
        """One special token more would end the user's turn in the middle, or begin another."""
        counts = [sum(token in self._special for token in ids) for ids in (teacher_ids, rollout.prompt_ids)]
        return [] if counts[0] == counts[1] else [f"the teacher's prompt holds {counts[0]} special tokens, the student's {counts[1]}"]

    def _solution_defects(self, scored: ScoredRollout, group: ScoredGroup, teacher: str, question: str) -> list[str]:
        rollout, privileged = scored.rollout, scored.privileged
        peer = self._peer(scored, group)
        if privileged.shown_index == rollout.index:
            return ["the rollout was shown itself"]
        if privileged.source == "peer" and peer is None:
            return [f"the shown rollout {privileged.shown_index} is not in the group"]
        shown = self._as_shown((group.problem.solution or "") if peer is None else peer.text, privileged.cut_tokens)
        defects = []
        if not shown or shown not in teacher:
            defects.append(f"the teacher's prompt does not hold the solution ({privileged.source})")
        if peer is not None and (peer.reward is None or peer.reward < CORRECT_REWARD):
            defects.append(f"the shown rollout {peer.index} has reward {peer.reward}: no verified solution")
        if peer is not None and peer.truncated:
            defects.append(f"the shown rollout {peer.index} was truncated")
        own = self._as_shown(rollout.text, 0)
        # A peer may have written the very same tokens, and a response may only repeat the question.
        if len(own) > LONG_TEXT and own in teacher and own not in shown and own not in question:
            defects.append("the rollout's own text stands in its teacher's prompt")
        return defects

    @staticmethod
    def _peer(scored: ScoredRollout, group: ScoredGroup) -> Rollout | None:
        return next((s.rollout for s in group.rollouts if s.rollout.index == scored.privileged.shown_index), None)

    def _cleaned_end(self, text: str, cut_tokens: int) -> str:
        """What may be shown of a text, squeezed, without its first `cut_tokens` tokens."""
        text = self._prompts.clean(text)
        if cut_tokens:
            offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            text = text[offsets[cut_tokens][0]:] if cut_tokens < len(offsets) else ""
        return _squeeze(text)

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
    """Without white space, in Unicode's composed form: tokenising and decoding may change both."""
    return unicodedata.normalize("NFC", "".join(text.split()))


def thinking_boundary(ending: str) -> str:
    """How a prompt leaves the thinking segment, from what follows the question."""
    if THINKING_END in ending:
        return "closed by the prompt (an empty thinking block)"
    if THINKING_START in ending:
        return "opened by the prompt"
    return "left to the response"
