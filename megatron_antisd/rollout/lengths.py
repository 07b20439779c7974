"""How long the responses to each problem were, for engines that begin with the longest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_antisd.records import RolloutGroup


class ResponseLengths:
    """The mean length of each problem's newest group. Training state: what it knows decides which groups are given up."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}

    def known(self) -> Mapping[str, int]:
        """Tokens by problem id, rounded up; a problem that was never drawn is missing."""
        return self._tokens

    def learn(self, groups: Iterable[RolloutGroup]) -> None:
        for group in groups:
            self._tokens[group.problem.id] = -(-sum(len(r.response_ids) for r in group.rollouts) // len(group.rollouts))

    def state_dict(self) -> dict[str, int]:
        return dict(self._tokens)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._tokens = {str(name): int(tokens) for name, tokens in state.items()}
