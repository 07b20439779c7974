"""Problems -> groups of rollouts, over any engine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

from megatron_antisd.records import Problem, Rollout, RolloutGroup
from megatron_antisd.rollout.engine import Engine, Finished, Request, Sampling


def rollout_seed(seed: int, step: int, problem_id: str, index: int) -> int:
    """The seed of one rollout, 0 .. 2^63 - 1: the same in every process and Python version, so a resumed run draws the same."""
    text = f"{seed}/{step}/{index}/{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generate_groups(
    engine: Engine,
    problems: Sequence[Problem],
    prompt_ids: Sequence[tuple[int, ...]],
    *,
    sampling: Sampling,
    group_size: int,
    seed: int,
    step: int,
    decode: Callable[[Sequence[int]], str],
    finished: Finished | None = None,
) -> list[RolloutGroup]:
    """`group_size` rollouts of each problem, groups in the order of `problems`, on every rank. Collective.

    `prompt_ids[i]` is problem i's tokenized student prompt; `decode` turns response ids into text without special tokens.
    `finished`: see Engine.generate; rollout j of problem i has the index `i * group_size + j`.
    A problem that stands in the batch twice gets different draws each time. Raises ValueError when the two sequences differ
    in length, EngineError from the engine.
    """
    requests: list[Request] = []
    seen: Counter[str] = Counter()
    for problem, prompt in zip(problems, prompt_ids, strict=True):
        first = group_size * seen[problem.id]
        seen[problem.id] += 1
        requests += [Request(prompt_ids=tuple(prompt), seed=rollout_seed(seed, step, problem.id, first + index))
                     for index in range(group_size)]
    generations = engine.generate(requests, sampling, finished)
    version = engine.policy_version
    groups = []
    for start, problem, prompt in zip(range(0, len(requests), group_size), problems, prompt_ids, strict=True):
        rollouts = tuple(
            Rollout(problem_id=problem.id, index=index, prompt_ids=tuple(prompt), response_ids=generation.response_ids,
                    engine_log_probs=generation.log_probs, truncated=generation.truncated,
                    policy_version=generation.version_spans[0][0] if generation.version_spans else version,
                    version_spans=generation.version_spans, text=decode(generation.response_ids))
            for index, generation in zip(range(group_size), generations[start:start + group_size], strict=True)
        )
        groups.append(RolloutGroup(problem=problem, rollouts=rollouts))
    return groups
