"""Problems -> groups of rollouts, over any engine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from megatron_antisd.records import Problem, Rollout, RolloutGroup
from megatron_antisd.rollout.engine import Engine, Finished, Generation, Quota, Request, Sampling


def rollout_seed(seed: int, step: int, problem_id: str, index: int) -> int:
    """The seed of one rollout, 0 .. 2^63 - 1: the same in every process and Python version, so a resumed run draws the same."""
    text = f"{seed}/{step}/{index}/{problem_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def make_requests(problems: Sequence[Problem], prompt_ids: Sequence[tuple[int, ...]], *, group_size: int, seed: int, step: int,
                  seen: Counter[str] | None = None, expected: Mapping[str, int] | None = None) -> list[Request]:
    """`group_size` requests for each problem: see `generate_groups`."""
    requests: list[Request] = []
    seen = Counter() if seen is None else seen
    for problem, prompt in zip(problems, prompt_ids, strict=True):
        first = group_size * seen[problem.id]
        seen[problem.id] += 1
        tokens = None if expected is None else expected.get(problem.id)
        requests += [Request(prompt_ids=tuple(prompt), seed=rollout_seed(seed, step, problem.id, first + index), expected_tokens=tokens)
                     for index in range(group_size)]
    return requests


def make_groups(problems: Sequence[Problem], prompt_ids: Sequence[tuple[int, ...]], generations: Sequence[Generation | None], *, group_size: int,
                version: int, decode: Callable[[Sequence[int]], str]) -> list[RolloutGroup | None]:
    """What came back for them; None for a group that was given up. `version`: of the weights, where a generation does not say."""
    groups: list[RolloutGroup | None] = []
    for start, problem, prompt in zip(range(0, len(generations), group_size), problems, prompt_ids, strict=True):
        if generations[start] is None:
            groups.append(None)
            continue
        rollouts = tuple(
            Rollout(problem_id=problem.id, index=index, prompt_ids=tuple(prompt), response_ids=generation.response_ids,
                    engine_log_probs=generation.log_probs, truncated=generation.truncated,
                    policy_version=generation.version_spans[0][0] if generation.version_spans else version,
                    version_spans=generation.version_spans if len(generation.version_spans) > 1 else (), routes=generation.routes,
                    text=decode(generation.response_ids))
            for index, generation in zip(range(group_size), generations[start:start + group_size], strict=True)
        )
        groups.append(RolloutGroup(problem=problem, rollouts=rollouts))
    return groups


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
    quota: int | None = None,
    seen: Counter[str] | None = None,
    expected: Mapping[str, int] | None = None,
) -> list[RolloutGroup | None]:
    """`group_size` rollouts of each problem, groups in the order of `problems`, on every rank. Collective.

    `prompt_ids[i]` is problem i's tokenized student prompt; `decode` turns response ids into text without special tokens.
    `finished`: see Engine.generate; rollout j of problem i has the index `i * group_size + j`.
    `quota`: the engine stops when so many groups are complete; those of the others are None (without it none is).
    A problem that stands in the batch twice gets different draws each time; `seen` counts its groups, to go on with in a later call of the same
    step. `expected`: by problem id, how long its responses may become, for the order of requests; None leaves the order alone. Raises ValueError
    when the two sequences differ in length, EngineError from the engine.
    """
    requests = make_requests(problems, prompt_ids, group_size=group_size, seed=seed, step=step, seen=seen, expected=expected)
    generations = engine.generate(requests, sampling, finished, None if quota is None else Quota(groups=quota, group_size=group_size))
    return make_groups(problems, prompt_ids, generations, group_size=group_size, version=engine.policy_version, decode=decode)
