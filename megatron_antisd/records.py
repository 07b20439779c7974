"""The records that stages hand to each other. Frozen, keyword-only, no behaviour beyond checks and lengths.

The way of the data:

    Problem -> Rollout x G = RolloutGroup -> graded Rollouts -> ScoringView (student or teacher prompt + response)
            -> TokenScores -> TrainingBatch -> StepStats

Shapes are stated beside the fields; `T_i` is the response length of rollout `i`, `N` the number of rollouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_antisd.token_routes import TokenRoutes, routes_from_json

if TYPE_CHECKING:  # a grading worker reads `CodeTests` and has no use for torch, which takes seconds to import
    import torch


CORRECT_REWARD = 1.0
"""From this reward on a rollout is correct: a program that passes some of its tests is no verified solution."""


@dataclass(frozen=True, kw_only=True)
class CodeTests:
    """The hidden tests of a programming task. What is expected never reaches the process that runs the program.

    Examples: a function `CodeTests(entry_point="add", cases=(("(1, 2)", "3"),))`,
    a program `CodeTests(entry_point=None, cases=(("1 2\\n", "3\\n"),))`.
    """

    entry_point: str | None
    """The function that is called; None: a program that reads standard input and writes standard output."""
    cases: tuple[tuple[str, str], ...] = ()
    """(input, expected) of each test. With an entry point Python literals: the tuple of arguments, and the value that must come back.
    Without one: the text on standard input, and the text that must be written."""
    assertions: tuple[str, ...] = ()
    """Tests written as code, each passed when it raises nothing; they call the entry point by its name or as `candidate`."""
    preamble: str = ""
    """Code that stands before every program: the imports and helpers that the problem's text gives."""
    compare: str = "equal"
    """How a value that came back is compared: `equal`, `unordered` (as sets) or `not_none` (whether there is a value at all)."""
    tolerance: float = 0.0
    """Absolute tolerance of floats, also inside of lists; 0.0 compares exactly."""
    checker: str | None = None
    """Source of `check(arguments, output, expected) -> bool`, which decides instead of `compare` where several values are right. It is tried once
    with `output = expected`, so what is expected must be one of the right values."""

    @property
    def count(self) -> int:
        return len(self.cases) + len(self.assertions)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One task with a verifiable answer. Example: `Problem(id="dapo-1", prompt="2+2?", answer="4", solution=None)`."""

    id: str
    prompt: str
    """The data set's question as plain text; data.prompt_template is applied by the prompt builder."""
    answer: str
    """What the grader compares with; empty where `tests` decide."""
    tests: CodeTests | None = None
    """Of a programming task."""
    solution: str | None = None
    """The data set's reference solution, used as privileged context where no peer rollout is correct."""
    source: str = ""


def problem_from_json(row: Mapping[str, Any]) -> Problem:
    """The inverse of `dataclasses.asdict` followed by JSON, which turns tuples into lists."""
    tests = row.get("tests")
    return Problem(**{**row, "tests": None if tests is None else code_tests_from_json(tests)})


def code_tests_from_json(row: Mapping[str, Any]) -> CodeTests:
    cases = tuple((given, expected) for given, expected in row.get("cases", ()))
    return CodeTests(**{**row, "cases": cases, "assertions": tuple(row.get("assertions", ()))})


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response and all that is known about it."""

    problem_id: str
    index: int
    """Position in its group, 0..G-1."""
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    """Sampled token ids, the end token included when it was sampled. Never empty."""
    engine_log_probs: tuple[float, ...]
    """Log-prob of each response token under the sampling distribution's raw logits, nats; same length as `response_ids`."""
    truncated: bool
    """True when generation stopped at the length limit rather than at an end token."""
    policy_version: int
    """The number of weight updates the generating policy had seen, at the first token."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(policy version, number of tokens) of each stretch drawn from one set of weights, in order, where there are several; else empty."""
    routes: TokenRoutes | None = None
    """Experts of prompt + response[:-1] that the update uses; None: the trainer's own choice."""
    text: str = ""
    """The decoded response without special tokens."""
    reward: float | None = None
    """Set by grading. None means "not graded yet" and is never read as 0."""
    feedback: str | None = None
    """The correctness feedback shown to the teacher; set by grading."""

    def __post_init__(self) -> None:
        if not self.response_ids:
            raise ValueError(f"rollout {self.index} of problem {self.problem_id!r} has a response of zero tokens; "
                             "the engine must return at least the end token")
        if len(self.engine_log_probs) != len(self.response_ids):
            raise ValueError(f"rollout {self.index} of problem {self.problem_id!r}: {len(self.engine_log_probs)} engine "
                             f"log-probs for {len(self.response_ids)} response tokens; they must be equal in number")
        if sum(tokens for _, tokens in self.spans) != len(self.response_ids) or self.spans[0][0] != self.policy_version:
            raise ValueError(f"rollout {self.index} of problem {self.problem_id!r}: the spans {self.version_spans} (policy version, tokens) must add "
                             f"up to {len(self.response_ids)} response tokens and begin with policy version {self.policy_version}")
        inputs = len(self.prompt_ids) + len(self.response_ids) - 1
        if self.routes is not None and self.routes.tokens != inputs:
            raise ValueError(f"rollout {self.index} of problem {self.problem_id!r} has routes of {self.routes.tokens} tokens; its prompt of "
                             f"{len(self.prompt_ids)} and its response of {len(self.response_ids)} put {inputs} tokens into the model")

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """`version_spans`, also where there is one."""
        return self.version_spans or ((self.policy_version, len(self.response_ids)),)

    def graded(self, reward: float, feedback: str) -> Rollout:
        return dataclasses.replace(self, reward=reward, feedback=feedback)


def rollout_from_json(row: Mapping[str, Any]) -> Rollout:
    """The inverse of `dataclasses.asdict` followed by JSON (bytes by `token_routes.json_bytes`)."""
    sequences = {name: tuple(row[name]) for name in ("prompt_ids", "response_ids", "engine_log_probs")}
    spans = tuple((version, tokens) for version, tokens in row.get("version_spans", ()))  # files of earlier releases have none
    return Rollout(**{**row, **sequences, "version_spans": spans, "routes": routes_from_json(row.get("routes"))})


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """A problem and its G rollouts."""

    problem: Problem
    rollouts: tuple[Rollout, ...]

    def rewards(self) -> torch.Tensor:
        """[G] float64; raises when a rollout has no reward."""
        import torch

        missing = [r.index for r in self.rollouts if r.reward is None]
        if missing:
            raise ValueError(f"rollouts {missing} of problem {self.problem.id!r} have no reward; grade the group first")
        return torch.tensor([r.reward for r in self.rollouts], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ScoringView:
    """A prompt and the response to be scored under it. The student's and the teacher's views of one rollout differ
    in `prompt_ids` only: `response_ids` are the same token ids."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    routes: TokenRoutes | None = None
    """Experts of prompt + response[:-1], in which the trainer then scores and learns; None: it routes by itself."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Scores of every response token of N views, concatenated in the order of the views."""

    log_prob: torch.Tensor
    """[sum T_i] float32, nats."""
    entropy_median: float | None
    """Exact lower median of the same tokens' entropies over the full vocabulary, nats; None where none was asked for."""
    entropy: torch.Tensor | None = None
    """[sum T_i] float32, those entropies; None where they were left on the ranks that computed them."""
    lengths: tuple[int, ...]
    """T_i of each view."""
    routes: tuple[TokenRoutes, ...] | None = None
    """Of each view, the experts that its tokens went to; None where they were not asked for."""

    def __post_init__(self) -> None:
        expected = sum(self.lengths)
        for name in ("log_prob", "entropy"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (expected,):
                raise ValueError(f"TokenScores.{name} has shape {tuple(tensor.shape)}, expected ({expected},) "
                                 f"from {len(self.lengths)} responses")


class NonFiniteScores(ValueError):
    """Log-probs of scored responses are NaN or infinite; raised on every rank alike. `token` is the first one's index among all scored response
    tokens, `view` that of its view, `position` its place in that view's response. `lengths` are those of the views' responses."""

    def __init__(self, message: str, *, token: int, lengths: Sequence[int]) -> None:
        super().__init__(message)
        self.token, self.view, self.position = token, 0, token
        for length in lengths:
            if self.position < length:
                break
            self.view, self.position = self.view + 1, self.position - length


@dataclass(frozen=True, kw_only=True)
class PrivilegedView:
    """The teacher's view of one rollout, or the reason why it has none."""

    view: ScoringView | None
    """None: this rollout has no teacher term (masked and counted)."""
    source: str
    """`peer`, `reference`, or the reason for a missing view: `no_solution`, `no_room`."""
    shown_index: int | None = None
    """Index in the group of the rollout shown, when `source` is `peer`."""
    cut_tokens: int = 0
    """Tokens at the solution's beginning that were left out."""


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A graded rollout with what the teacher saw and what both said of its tokens: for people and for audits."""

    rollout: Rollout
    privileged: PrivilegedView
    student_log_prob: tuple[float, ...] | None
    """Of each response token, nats; None where the training forward gave none (a dropped group, a skipped update)."""
    teacher_log_prob: tuple[float, ...] | None
    """Of each response token, nats; None where there was no teacher."""

    @property
    def u(self) -> tuple[float, ...] | None:
        """teacher - student log-prob of each response token; None where either is missing."""
        if self.student_log_prob is None or self.teacher_log_prob is None:
            return None
        return tuple(t - s for t, s in zip(self.teacher_log_prob, self.student_log_prob, strict=True))


@dataclass(frozen=True, kw_only=True)
class ScoredGroup:
    problem: Problem
    rollouts: tuple[ScoredRollout, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """Everything one policy update needs. The student's log-probs are not here: they come from the training forward."""

    views: tuple[ScoringView, ...]
    """Student views, N of them; on every rank the whole global batch."""
    sequence_advantage: torch.Tensor
    """[N] float32, A_seq of the rollout (method: group-normalised reward)."""
    sequence_mask: torch.Tensor
    """[N] bool; False takes the rollout's tokens out of the loss (a dropped zero-variance group, say)."""
    teacher_log_prob: torch.Tensor
    """[sum T_i] float32; meaningful only where `teacher_mask`."""
    teacher_mask: torch.Tensor
    """[sum T_i] bool."""
    old_log_prob: torch.Tensor | None
    """[sum T_i] float32 log-probs of the policy that sampled, or None on-policy (the ratio is then exactly 1)."""
    engine_log_prob: torch.Tensor
    """[sum T_i] float32, for the mismatch metrics."""
    lambda_: float
    """g * lambda_max of this step; 0.0 skips the token term."""
    tokens: int
    """The global number of response tokens in the loss: the denominator of the token mean."""
    correction_log_ratio: torch.Tensor | None = None
    """[sum T_i] float32 log(trainer / engine probability) that each token's importance weight is formed from; None: the token's own, from the
    training forward or `old_log_prob`."""
    empty_context_log_prob: torch.Tensor | None = None
    """[n <= sum T_i] float32, the teacher's path on the first responses without privileged context, for the noise floor; None: not measured."""

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(v.response_ids) for v in self.views)


@dataclass(frozen=True, kw_only=True)
class UpdateFigures:
    """What is known of one update before it is applied; global values, the same on every rank."""

    loss: float
    grad_norm: float
    """Of the whole gradient, before clipping."""
    clip_fraction: float
    student_entropy_mean: float
    mismatch_kl: float
    """mean of k3 = exp(d) - 1 - d with d = trainer - engine log-prob, over response tokens."""
    mismatch_mean: float
    """mean |trainer - engine log-prob|."""
    mismatch_max: float
    broken_tokens: int = 0
    """Response tokens whose log-prob under the student is not finite; their u is not either."""
    correction_weight_mean: float | None = None
    """Of the importance weights as applied, over tokens in the loss; this and the next three are None where the correction is off."""
    correction_weight_max: float | None = None
    correction_weight_min: float | None = None
    correction_touched_share: float | None = None
    """Share of those tokens whose weight was truncated or masked."""
    noise_floor_mean: float | None = None
    """mean |u| under an empty privileged context, where it must be 0; this and the next two are None where it was not measured."""
    noise_floor_max: float | None = None
    noise_floor_share: float | None = None
    """Share of tokens above 0.1 nats."""

    @property
    def finite(self) -> bool:
        """Whether the update may be applied at all. The mismatch is not asked: where the engine's log-probs take part in the update
        (`correction`), the loss shows it."""
        return not self.broken_tokens and all(map(math.isfinite, (self.loss, self.grad_norm, self.student_entropy_mean)))


@dataclass(frozen=True, kw_only=True)
class StepStats(UpdateFigures):
    """What one update reports; every rank holds the same values."""

    skipped: bool
    """True when the update was not applied: it was not finite, or it was refused. Nothing has changed then."""
    padding_share: float
    """Share of tokens through the model that were padding."""
    student: TokenScores
    """The training forward's own log-probs, no gradient, in the order of the batch's views."""
    routes_equal: tuple[float, ...] | None = None
    """For each layer the share of tokens with given experts for which the router would have chosen the same set; None without any."""
