"""Proof of every weight sync: the engine's log-probs of its own samples against the trainer's scores of the same tokens.

The probe's prompt is the same every time and longer than one KV block, so that a prefix cache that survived the update shows:
its keys and values would be the old weights'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_antisd.records import ScoringView, TokenScores
from megatron_antisd.rollout.engine import Engine, EngineError, Request, Sampling

PROBE_TOKENS = 8
SEEDS_A_VERSION = 1 << 12
"""Other samples, and other experts, after each update; the same after a restart."""
SHOWN_PROBLEMS = 6
"""Of tensors whose checksums differ, in the message."""
LONGER_THAN_A_BLOCK = 160
"""vLLM's KV block is 128 tokens on CPU, 16 on GPUs."""
DEFAULT_LIMIT = {"float32": 1e-4, "bfloat16": 0.1}
"""Largest mean |engine - trainer log-prob| accepted, nats. fp32 agrees to about 1e-6; bf16 kernels and routers differ."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """|engine - trainer log-prob| over the probe's tokens, nats."""

    mean: float
    max: float


class SyncProbe:
    """`score` is the trainer's, `limit` the largest mean difference accepted. Each copy of the weights answers: `requests` and more where the engine
    has more copies."""

    def __init__(self, prompt: Sequence[int], *, score: Callable[[Sequence[ScoringView]], TokenScores], requests: int, limit: float,
                 max_context: int, temperature: float, routes: bool = False) -> None:
        """`routes`: the trainer scores with the experts that the engine chose, which then only leaves rounding."""
        room = max_context - PROBE_TOKENS
        if not prompt or room < 1:
            raise ValueError(f"the sync probe needs a prompt and a context above {PROBE_TOKENS}, got {len(prompt)} tokens and {max_context}")
        repeated = tuple(prompt) * (LONGER_THAN_A_BLOCK // len(prompt) + 1)
        self._prompt, self._requests = repeated[: min(LONGER_THAN_A_BLOCK, room)], requests
        self._sampling = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=PROBE_TOKENS, ignore_eos=True, routes=routes)
        self._score, self._limit = score, limit

    def __call__(self, engine: Engine) -> ProbeResult:
        """Sample and compare; collective. Raises EngineError beyond the limit."""
        requests = [Request(prompt_ids=self._prompt, seed=engine.policy_version * SEEDS_A_VERSION + i, place=i)
                    for i in range(max(self._requests, engine.replicas))]
        generations = engine.generate(requests, self._sampling)
        views = [ScoringView(prompt_ids=r.prompt_ids, response_ids=g.response_ids, routes=g.routes)
                 for r, g in zip(requests, generations, strict=True)]
        theirs = torch.tensor([p for g in generations for p in g.log_probs], dtype=torch.float64)
        difference = (self._score(views).log_prob.double() - theirs).abs()
        result = ProbeResult(mean=float(difference.mean()), max=float(difference.max()))
        if not result.mean <= self._limit:
            raise EngineError(
                f"after weight sync {engine.policy_version} the engine's log-probs differ from the trainer's by {result.mean:.2e} on average "
                f"(max {result.max:.2e}), above the limit {self._limit:.0e}: the engine does not hold the trainer's weights. "
                "Raise rollout.probe_max_mean only if this is the two kernels' rounding.")
        return result


class Weights(Protocol):
    """The trainer's, for an engine."""

    def stream(self) -> Iterable[tuple[str, torch.Tensor]]:
        """See Engine.load_weights."""
        ...

    def sample(self, version: int) -> Sequence[str]:
        """Tensors whose checksums are compared after this sync."""
        ...

    def problems(self, names: Sequence[str], version: int, checksums: Sequence[Mapping[str, int]]) -> Sequence[str]:
        """What differs between the trainer's shards of these tensors and what the engine of each rank holds; collective."""
        ...


def synchronise(engine: Engine, weights: Weights, version: int, probe: SyncProbe) -> ProbeResult:
    """New weights into the engine, then both proofs: checksums of some tensors as the engine holds them, and the probe. Collective. Raises
    EngineError on every rank where they differ from the trainer's."""
    engine.wake()
    names = weights.sample(version)
    checksums = engine.load_weights(weights.stream(), version, **({"check": names} if names else {}))
    problems = weights.problems(names, version, checksums) if checksums is not None else ()
    if problems:
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise EngineError(f"after weight sync {version} the engine does not hold the trainer's weights: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}")
    return probe(engine)
