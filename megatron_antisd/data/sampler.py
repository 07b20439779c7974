"""Which problems come next: deterministic, endless, resumable at any point.

The randomness is a hash of (seed, epoch, problem id) rather than a library's generator: the same on every machine, version and rank, without
a stream whose state must be saved.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from megatron_antisd.data.problems import fingerprint
from megatron_antisd.data.rows import ProblemDataError
from megatron_antisd.records import Problem

logger = logging.getLogger(__name__)


def stable_hash(*parts: str | int) -> int:
    """A 64-bit hash of the parts, the same in every process (Python's `hash` is not)."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


class ProblemSampler:
    """Batches of `per_step` problems over endless epochs, each epoch a permutation of its own from (seed, epoch).

    A batch at an epoch's end takes what is left and goes on with the next epoch, where problems it already holds wait until
    after the batch: nothing is skipped, and no problem is twice in a batch. `shuffle=False` keeps the order of the files.
    Raises ProblemDataError when there are fewer problems than `per_step`.
    """

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int, shuffle: bool = True) -> None:
        if per_step < 1:
            raise ValueError(f"per_step must be at least 1, got {per_step}")
        if len(problems) < per_step:
            raise ProblemDataError(f"the data set has {len(problems)} problems, a step needs {per_step}; add data or lower "
                                   f"rollout.problems_per_step to at most {len(problems)}")
        if len({problem.id for problem in problems}) != len(problems):
            raise ValueError("problem ids repeat; load_problems checks that they are unique")
        self._problems = tuple(problems)
        self._per_step, self._seed, self._shuffle = per_step, seed, shuffle
        self._fingerprint = fingerprint(problems)
        self._restart()

    def next(self) -> list[Problem]:
        """The next `per_step` problems, all different."""
        batch = self._order[self._position:self._position + self._per_step]
        self._position += len(batch)
        missing = self._per_step - len(batch)
        if missing:
            self._start_epoch(self._epoch + 1, tail=batch)
            batch = batch + self._order[:missing]
            self._position = missing
        return [self._problems[index] for index in batch]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; `position` counts the problems of `epoch` that were handed out."""
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint,
                "seed": self._seed, "per_step": self._per_step, "shuffle": self._shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError for another data set or a state that cannot be."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(f"the sampler's state lacks {missing}; it holds {sorted(state)}")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(f"the sampler's state belongs to another data set (fingerprint {state['fingerprint'][:12]}..., this one has "
                             f"{self._fingerprint[:12]}...): resume with the same data.train files, or start a new run")
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= len(self._problems):
            raise ValueError(f"the sampler's state is impossible: epoch {epoch}, position {position} of {len(self._problems)} problems")
        for name in ("seed", "per_step", "shuffle"):
            if state[name] != self.state_dict()[name]:
                logger.warning("the data position was saved with %s=%s and continues with %s=%s: some problems of this epoch may "
                               "come twice or not at all", name, state[name], name, self.state_dict()[name])
        # An epoch's order depends on the batch that straddles its beginning, so it follows from the orders before it.
        self._restart()
        while self._epoch < epoch:
            straddling = (self._epoch + 1) * len(self._problems) % self._per_step
            self._start_epoch(self._epoch + 1, tail=self._order[len(self._order) - straddling:])
        self._position = position

    def _restart(self) -> None:
        self._epoch = 0
        self._start_epoch(0, tail=[])

    def _start_epoch(self, epoch: int, tail: list[int]) -> None:
        """Set the order of `epoch`; `tail`: indices already in the batch that the epoch's first problems complete."""
        order = list(range(len(self._problems)))
        if self._shuffle:
            order.sort(key=lambda index: stable_hash("order", self._seed, epoch, self._problems[index].id))
        if tail:
            held = set(tail)
            head = [index for index in order if index not in held][:self._per_step - len(tail)]
            taken = set(head)
            order = head + [index for index in order if index not in taken]
        self._epoch, self._order, self._position = epoch, order, 0
