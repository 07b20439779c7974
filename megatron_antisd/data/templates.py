"""Problem -> student prompt; graded group -> teacher (privileged) prompts, both through the model's own chat template.

Student and teacher prompts come from one rendering function with one set of chat-template arguments, so the boundary between
prompt and response (an empty think block, say) is the same for both, and the response keeps its token ids.

Who is shown what (AntiSD, Algorithm 1's context c = verified solution + feedback; the choices the paper leaves open):
  * A rollout is *correct* when its reward is at least 1.0: a program that passes some of its tests is no verified solution.
  * One correct, not truncated rollout of the group is drawn from (seed, step, problem id) and shown to all others; itself it is
    shown a second one, so a group has at most two solutions. "Itself" is the rollout, not its text: two rollouts that happen to
    hold the same tokens may be shown to each other. Where there is no peer: the data set's solution; else no teacher.
  * The feedback is that of the rollout being scored.
  * What does not fit is cut from the solution's beginning. The cut is made in the text, at a token's first character, and the
    whole prompt is tokenised again and measured: a text cut differently may need more tokens than before.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_antisd.config import DataConfig, PrivilegedConfig
from megatron_antisd.data.sampler import stable_hash
from megatron_antisd.records import CORRECT_REWARD, PrivilegedView, Problem, Rollout, RolloutGroup, ScoringView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED_CHAT_ARGUMENTS = ("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors",
                           "padding", "truncation", "max_length")


class PromptError(ValueError):
    """A prompt cannot be built; the message says for which problem or option, and what to change."""


class PromptBuilder:
    """Prompts of one run. `max_context` bounds prompt + response, in tokens. Needs a tokenizer that reports character offsets (any
    `tokenizers`-backed one) and has a chat template; raises PromptError otherwise."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, privileged: PrivilegedConfig, max_context: int) -> None:
        if not tokenizer.chat_template:
            raise PromptError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template (base models often come without); put the "
                              "model's chat_template.jinja beside its tokenizer, or set `chat_template` in tokenizer_config.json")
        if not tokenizer.is_fast:
            raise PromptError(f"the tokenizer {tokenizer.name_or_path!r} reports no character offsets, which cutting a solution needs; "
                              "convert it to the tokenizer.json format")
        if privileged.minimum_solution_tokens > privileged.solution_tokens:
            raise PromptError(f"privileged.minimum_solution_tokens={privileged.minimum_solution_tokens} exceeds privileged.solution_tokens="
                              f"{privileged.solution_tokens}: no rollout could have a teacher; lower the first or raise the second")
        _check_chat_arguments(data.chat_template_kwargs, tokenizer.get_chat_template())
        self._tokenizer, self._data, self._privileged, self._max_context = tokenizer, data, privileged, max_context
        self._special = _special_token_pattern(tokenizer)
        # Bounded: a long run passes through every problem, and a tuple of ids takes some 40 bytes a token.
        self._student_prompt = functools.lru_cache(maxsize=4096)(self._build_student_prompt)

    def student_prompt(self, problem: Problem) -> tuple[int, ...]:
        """Token ids up to and with the generation prompt. Raises PromptError where no response token would fit. Cached."""
        return self._student_prompt(problem)

    def require_room(self, problems: Sequence[Problem], response_tokens: int, setting: str) -> None:
        """Raises PromptError where a prompt and a response of `response_tokens` (named by `setting`) exceed the context: before a run
        starts, not at the step that draws the problem. No prompt has more tokens than bytes, so only the long ones are tokenised."""
        room = self._max_context - response_tokens
        around = len(self.student_prompt(min(problems, key=lambda problem: len(problem.prompt))))
        long = [problem for problem in problems if around + len(problem.prompt.encode()) > room]
        lengths = {problem.id: len(self._encode_turn(self.question(problem))) for problem in long}
        excess = [identifier for identifier, length in lengths.items() if length > room]
        if excess:
            longest = max(excess, key=lengths.__getitem__)
            raise PromptError(f"{len(excess)} of {len(problems)} problems leave no room for {setting}={response_tokens} tokens in the context of "
                              f"{self._max_context}; the longest prompt, of problem {longest!r}, has {lengths[longest]} tokens, possible are {room}. "
                              f"Lower {setting}, raise rollout.max_context or take these out of the data: {excess[:5]}")

    def privileged_views(self, group: RolloutGroup, *, seed: int, step: int) -> list[PrivilegedView]:
        """The teacher's view of every rollout, in the group's order. Raises ValueError on rollouts without reward or feedback."""
        shown = self._assign(group, seed=seed, step=step)
        feedbacks = [self.without_special(feedback_for(rollout)) for rollout in group.rollouts]
        question = self.question(group.problem)

        # At most two solutions and a few feedback texts: most rollouts of a group share a prompt, which is built once.
        @functools.cache
        def encode(solution: _Solution, keep: int, feedback: str) -> tuple[int, ...]:
            values = {"problem": question, "solution": solution.tail(keep), "feedback": feedback}
            return self._encode_turn(_fill(self._privileged.template, values))

        views = []
        for rollout, solution, feedback in zip(group.rollouts, shown, feedbacks, strict=True):
            if solution is None:
                views.append(PrivilegedView(view=None, source="no_solution"))
                continue
            fitting = self._fitting(functools.partial(encode, solution, feedback=feedback), solution, len(rollout.response_ids))
            if fitting is None:
                views.append(PrivilegedView(view=None, source="no_room"))
                continue
            prompt, keep = fitting
            views.append(PrivilegedView(view=ScoringView(prompt_ids=prompt, response_ids=rollout.response_ids), source=solution.source,
                                        shown_index=solution.index, cut_tokens=solution.tokens - keep))
        return views

    def _fitting(self, encode: functools.partial[tuple[int, ...]], solution: _Solution, response: int) -> tuple[tuple[int, ...], int] | None:
        """The teacher prompt with the longest end of `solution` that fits beside `response` tokens, and that end's tokens; None where less
        than `privileged.minimum_solution_tokens` of it would be left. A solution shorter than that passes when it fits whole."""
        room = self._max_context - response
        keep = solution.allowed
        smallest = max(1, min(self._privileged.minimum_solution_tokens, keep))
        while keep >= smallest:
            prompt = encode(keep)
            if len(prompt) <= room:
                return prompt, keep
            keep -= len(prompt) - room
        return None

    def _assign(self, group: RolloutGroup, *, seed: int, step: int) -> list[_Solution | None]:
        """The solution each rollout is shown."""
        rewards = group.rewards().tolist()
        texts = {position: self.clean(rollout.text) for position, (rollout, reward) in enumerate(zip(group.rollouts, rewards, strict=True))
                 if reward >= CORRECT_REWARD and not rollout.truncated}
        candidates = [position for position, text in texts.items() if text]

        def peer(position: int) -> _Solution | None:
            return self._solution(texts[position], "peer", group.rollouts[position].index)

        def reference() -> _Solution | None:
            return self._solution(self.clean(group.problem.solution or ""), "reference", None)

        if not candidates:
            return [reference()] * len(group.rollouts)
        first = candidates[stable_hash("shown", seed, step, group.problem.id) % len(candidates)]
        others = [position for position in candidates if position != first]
        to_others = peer(first)
        to_first = peer(others[stable_hash("second", seed, step, group.problem.id) % len(others)]) if others else reference()
        return [to_first if position == first else to_others for position in range(len(group.rollouts))]

    def clean(self, text: str) -> str:
        """What may be shown of a text: no thinking (an option), and no text that the tokenizer would read as a special token,
        which would end the user's turn in the middle."""
        if self._privileged.strip_thinking:
            text = strip_thinking(text)
        return self.without_special(text).strip()

    def without_special(self, text: str) -> str:
        """Without what the tokenizer would read as a special token."""
        while self._special is not None and self._special.search(text):  # taking one out can put another together
            text = self._special.sub("", text)
        return text

    def _solution(self, text: str, source: str, index: int | None) -> _Solution | None:
        """None for a text of nothing. `allowed` honours privileged.solution_tokens, counted on the text as it is shown."""
        if not text:
            return None
        offsets = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        solution = _Solution(text, tuple(start for start, _ in offsets), source, index)
        limit = self._privileged.solution_tokens
        while solution.allowed > limit or (solution.allowed < solution.tokens and self._count(solution.tail(solution.allowed)) > limit):
            solution.allowed = min(limit, solution.allowed - 1)
        return solution

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _build_student_prompt(self, problem: Problem) -> tuple[int, ...]:
        prompt = self._encode_turn(self.question(problem))
        if len(prompt) >= self._max_context:
            raise PromptError(f"problem {problem.id!r}: its prompt has {len(prompt)} tokens and the context (prompt + response) "
                              f"{self._max_context}, so no response fits; raise rollout.max_context or take the problem out of the data")
        return prompt

    def question(self, problem: Problem) -> str:
        """The student's user turn: `data.prompt_template` around the problem's text."""
        return _fill(self._data.prompt_template, {"problem": problem.prompt})

    def _encode_turn(self, content: str) -> tuple[int, ...]:
        """Token ids of one user turn and the generation prompt. Both roles' prompts come from here."""
        messages = [{"role": "user", "content": content}]
        if self._data.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self._data.system_prompt})
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **self._data.chat_template_kwargs)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Solution:
    """A text that may be shown, with the character at which each of its tokens begins."""

    def __init__(self, text: str, starts: tuple[int, ...], source: str, index: int | None) -> None:
        self._text, self._starts = text, starts
        self.source, self.index = source, index
        self.tokens = self.allowed = len(starts)
        """Tokens of the whole text; how many of its last ones may be shown."""

    def tail(self, keep: int) -> str:
        """The text of the last `keep` tokens (all of a character that `keep` divides); always an exact end of the text."""
        if keep >= self.tokens:
            return self._text
        return self._text[self._starts[self.tokens - keep]:] if keep else ""


def feedback_for(rollout: Rollout) -> str:
    """The assessment of this very rollout. Raises ValueError before grading."""
    if rollout.feedback is None:
        raise ValueError(f"rollout {rollout.index} of problem {rollout.problem_id!r} has no feedback; grade the group first")
    return rollout.feedback


def strip_thinking(text: str) -> str:
    """`text` without <think>...</think>. An unopened block (the template opened it) reaches back to the beginning, an unclosed
    one goes on to the end."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    return text.rpartition("</think>")[2].partition("<think>")[0].strip()


def _fill(template: str, values: Mapping[str, str]) -> str:
    """All placeholders in one pass: a problem or a solution that itself holds `{solution}` is not expanded again."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], template)


def _check_chat_arguments(arguments: Mapping[str, object], chat_template: str) -> None:
    for name in arguments:
        if name in RESERVED_CHAT_ARGUMENTS:
            raise PromptError(f"data.chat_template_kwargs.{name} is set by the prompt builder itself; remove it")
        # Jinja ignores what a template does not ask for, so a misspelt option would change nothing and say nothing.
        if re.search(rf"\b{re.escape(name)}\b", chat_template) is None:
            raise PromptError(f"data.chat_template_kwargs.{name}: the tokenizer's chat template does not use {name!r}; "
                              "correct the name or remove it")


def _special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content})
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None
