"""Files of scored rollouts with plausible texts: pieces as a byte-level tokenizer has them, log-probs of known distributions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_antisd.metrics.files import ROLLOUTS
from megatron_antisd.metrics.scored_rollouts import write_scored
from megatron_antisd.records import PrivilegedView, Problem, Rollout, ScoredGroup, ScoredRollout, ScoringView

START, END, THINK, END_THINK = 151644, 151645, 151667, 151668
SPECIAL = {START: "<|im_start|>", END: "<|im_end|>", THINK: "<think>", END_THINK: "</think>"}
DELIBERATION = (" Wait", " Maybe", " Alternatively", " Hmm", "Wait", " Let", " But", " perhaps")
SHORTCUT = (" Given", " Assign", " holds", " Therefore", " Thus", "Answer", " final", " boxed")
NEWLINES = (".\n\n", "\n\n", "\n", ":\n", "$$\n")
SYLLABLES = ("ra", "ti", "on", "al", "num", "ber", "e", "qua", "sum", "pro", "duct", "in", "te", "gral", "mod", "ulo", "prime", "tri", "an", "gle",
             "cir", "cle", "poly", "no", "mi", "co", "ef", "fi", "cient", "root", "vec", "tor", "ma", "trix", "set", "gra", "ph", "lim", "it", "se")
SIGNS = (" +", " -", " =", "=", "(", ")", ",", ".", " \\", "frac", "{", "}", "^", "_", "$", " $", "$.", " x", "x", " n",
         "²", " 数", "\ufffd", "\t", "  ", " é", "<", ">")


def vocabulary() -> dict[int, str]:
    """About 3,300 ids with their texts; some texts stand for parts of a character, one is a tab, some are tags in wait."""
    rng = np.random.default_rng(7)
    words = [a + b for a in SYLLABLES for b in SYLLABLES]
    texts = [*map(str, range(10)), *SIGNS, *NEWLINES, *DELIBERATION, *SHORTCUT, *words, *(" " + word for word in words)]
    ids = np.sort(rng.choice(151_000, size=len(texts), replace=False))
    return dict(zip(map(int, ids), texts, strict=True)) | SPECIAL


class Texts:
    """Draws responses and their log-probs."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.texts = vocabulary()
        self.ids = np.array([token for token in self.texts if token not in SPECIAL])
        self.of_text = {text: token for token, text in self.texts.items()}
        common = {text: 60.0 for text in (*SIGNS, *NEWLINES, *DELIBERATION, *SHORTCUT)} | {str(digit): 200.0 for digit in range(10)}
        weights = np.array([common.get(self.texts[token], 1.0) for token in self.ids.tolist()])
        self.weights = weights / weights.sum()
        self.offset = {self.of_text[text]: -2.0 for text in DELIBERATION} | {self.of_text[text]: 1.5 for text in SHORTCUT}

    def ordinary(self, tokens: int) -> list[int]:
        return self.rng.choice(self.ids, size=tokens, p=self.weights).tolist()

    def response(self, tokens: int, truncated: bool) -> tuple[int, ...]:
        body = [THINK, *self.ordinary(tokens - 2)]
        body[tokens // 2] = END_THINK
        return (*body, self.ordinary(1)[0] if truncated else END)

    def log_probs(self, response: Sequence[int], drift: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Student and teacher: half of the tokens nearly certain; u moves by `drift` on deliberation and shortcut tokens."""
        size = len(response)
        certain = self.rng.random(size) < 0.5
        student = -np.where(certain, self.rng.exponential(0.01, size), self.rng.exponential(1.5, size))
        u = self.rng.normal(0.0, np.where(certain, 0.02, 0.5), size) + np.array([(1 + drift) * self.offset.get(t, 0.0) for t in response])
        return tuple(student.tolist()), tuple(np.minimum(student + u, -1e-9).tolist())

    def group(self, name: str, size: int, tokens: int, drift: float, kind: str = "peer") -> ScoredGroup:
        """`kind`: `peer`, `reference`, `no_solution`, or `dropped` (no student log-probs)."""
        prompt = (START, *self.ordinary(40), END, START)
        responses = [self.response(tokens, truncated=index == size - 1) for index in range(size)]
        rollouts = []
        for index, response in enumerate(responses):
            reward = float(index % 2 == 0) if kind != "no_solution" else 0.0
            shown = None if kind != "peer" else (2 if index == 0 else 0)
            student, teacher = self.log_probs(response, drift)
            feedback = "Your answer is correct." if reward else "Your answer is incorrect."
            source, view = ("peer" if kind in ("peer", "dropped") else kind), None
            if kind == "dropped":
                shown = 0 if index else 2
            if kind == "peer" and index == size - 2:
                source, shown = "no_room", None
            if source in ("peer", "reference"):
                solution = responses[shown][5:-1] if shown is not None else tuple(self.ordinary(tokens))
                extra = (self.of_text["\n\n"], *solution, self.of_text["\n\n"], *([self.of_text["1"]] if reward else [self.of_text["0"]]))
                view = ScoringView(prompt_ids=(*prompt[:-2], *extra, *prompt[-2:]), response_ids=response)
            rollout = Rollout(problem_id=name, index=index, prompt_ids=prompt, response_ids=response, engine_log_probs=student,
                              truncated=index == size - 1, policy_version=3, text="", reward=reward, feedback=feedback)
            rollouts.append(ScoredRollout(
                rollout=rollout, privileged=PrivilegedView(view=view, source=source, shown_index=shown, cut_tokens=5 if view else 0),
                student_log_prob=None if kind == "dropped" else student, teacher_log_prob=teacher if view else None))
        return ScoredGroup(problem=Problem(id=name, prompt=f"What is {name}?", answer="42", source="made"), rollouts=tuple(rollouts))


def write_steps(run: Path, *, steps: Sequence[int] = (10, 20), groups: int = 4, size: int = 4, tokens: int = 300, seed: int = 0,
                method: str = "antisd", kinds: Sequence[str] = ("peer", "reference", "no_solution", "dropped")) -> dict[int, tuple[ScoredGroup, ...]]:
    """`run/rollouts/step_*.jsonl`, as training writes them; returns what they hold."""
    texts = Texts(seed)
    written = {}
    for number, step in enumerate(steps):
        made = tuple(texts.group(f"made-{g}", size, tokens, 0.5 * number, kinds[g % len(kinds)]) for g in range(groups))
        write_scored(run / ROLLOUTS, step, method, made, texts.texts.__getitem__)
        written[step] = made
    return written
