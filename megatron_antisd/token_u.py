"""Mean u by kind of token: which words the teacher's knowledge of the answer makes more likely, and which less."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_antisd.records import RolloutGroup

MOST_FREQUENT = 64
"""Tokens reported when no `logging.token_kinds` is given."""


def token_u_rows(groups: Sequence[RolloutGroup], tokenizer: PreTrainedTokenizerBase, u: torch.Tensor, mask: torch.Tensor,
                 kinds: str | None) -> list[dict[str, Any]]:
    """Rows {kind, mean_u, count} over the response tokens of `groups` that have a teacher (`mask` [T]); `u` [T] in nats.

    `kinds` is a dotted path `package.module:function(problem, response_words) -> list[str]`, one kind a token; None groups by token.
    Raises ValueError when the function's answer has another number of kinds than the response has tokens.
    """
    name_kinds = load_function(kinds) if kinds else None
    values: dict[str, list[float]] = defaultdict(list)
    position = 0
    for group in groups:
        for rollout in group.rollouts:
            tokens = tokenizer.convert_ids_to_tokens(list(rollout.response_ids))
            names = name_kinds(group.problem.prompt, " ".join(tokens)) if name_kinds else tokens
            if len(names) != len(tokens):
                raise ValueError(f"logging.token_kinds={kinds} named {len(names)} kinds for {len(tokens)} tokens")
            for name, value, known in zip(names, u[position : position + len(tokens)].tolist(),
                                          mask[position : position + len(tokens)].tolist(), strict=True):
                if known:
                    values[name].append(value)
            position += len(tokens)
    frequent = sorted(values.items(), key=lambda item: (-len(item[1]), item[0]))
    return [{"kind": name, "mean_u": sum(us) / len(us), "count": len(us)} for name, us in (frequent if kinds else frequent[:MOST_FREQUENT])]


def load_function(path: str) -> Callable[[str, str], list[str]]:
    """Import `package.module:function`. Raises ValueError naming the path."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"logging.token_kinds={path!r} cannot be imported: {error}; expected package.module:function") from error
