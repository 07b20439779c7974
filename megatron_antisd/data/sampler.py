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
    """Batches of `per_step` problems, or of as many as are asked for, over endless epochs, each epoch a permutation of its own from (seed, epoch).

    A batch at an epoch's end takes what is left and goes on with the next epoch, where problems it already holds wait until
    after the batch: nothing is skipped, and no problem is twice in a batch. `shuffle=False` keeps the order of the files.
    Raises ProblemDataError when there are fewer problems than `per_step`.
    """

    def __init__(self, problems: Sequence[Problem], per_step: int, seed: int, shuffle: bool = True) -> None:
        if per_step < 1:
            raise ValueError(f"per_step must be at least 1, got {per_step}")
        if len(problems) < per_step:
            raise ProblemDataError(f"the data set has {len(problems)} problems, a step needs {per_step}; add data or lower "
                                   f"rollout.problems_per_step to at most {len(problems)} (tails.oversample multiplies it)")
        if len({problem.id for problem in problems}) != len(problems):
            raise ValueError("problem ids repeat; load_problems checks that they are unique")
        self._problems = tuple(problems)
        self._per_step, self._seed, self._shuffle = per_step, seed, shuffle
        self._fingerprint = fingerprint(problems)
        self._restart()

    def next(self, count: int | None = None) -> list[Problem]:
        """The next `count` problems, all different; None: `per_step`, which is also the most there may be."""
        count = self._per_step if count is None else count
        if not 1 <= count <= self._per_step:
            raise ValueError(f"asked for {count} problems at once, expected 1 to {self._per_step}")
        batch = self._order[self._position:self._position + count]
        self._position += len(batch)
        missing = count - len(batch)
        if missing:
            self._start_epoch(self._epoch + 1, tail=batch, head=missing)
            self._straddles.append([len(batch), missing])
            batch = batch + self._order[:missing]
            self._position = missing
        return [self._problems[index] for index in batch]

    def state_dict(self) -> dict[str, Any]:
        """Plain values; `position` counts the problems of `epoch` that were handed out, `straddles` how many of the batch at the beginning of each
        epoch but the first came from the epoch before and from this one."""
        return {"epoch": self._epoch, "position": self._position, "straddles": [list(pair) for pair in self._straddles],
                "fingerprint": self._fingerprint, "seed": self._seed, "per_step": self._per_step, "shuffle": self._shuffle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError for another data set or a state that cannot be."""
        missing = sorted(self.state_dict().keys() - state.keys() - {"straddles"})
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
        straddles = state.get("straddles")
        if straddles is None:  # of an earlier release, whose batches all had the same size
            tails = ((n + 1) * len(self._problems) % self._per_step for n in range(epoch))
            straddles = [[tail, self._per_step - tail] for tail in tails]
        if len(straddles) != epoch:
            raise ValueError(f"the sampler's state is impossible: epoch {epoch} with {len(straddles)} batches at the beginning of one")
        # An epoch's order depends on the batch that straddles its beginning, so it follows from the orders before it.
        self._restart()
        for tail, head in straddles:
            self._start_epoch(self._epoch + 1, tail=self._order[len(self._order) - tail:], head=head)
        self._position, self._straddles = position, [list(pair) for pair in straddles]

    def _restart(self) -> None:
        self._epoch, self._straddles = 0, []
        self._start_epoch(0, tail=[], head=0)

    def _start_epoch(self, epoch: int, tail: list[int], head: int) -> None:
        """Set the order of `epoch`; `tail`: indices already in the batch that the epoch's first `head` problems complete."""
        order = list(range(len(self._problems)))
        if self._shuffle:
            order.sort(key=lambda index: stable_hash("order", self._seed, epoch, self._problems[index].id))
        if tail:
            held = set(tail)
            first = [index for index in order if index not in held][:head]
            taken = set(first)
            order = first + [index for index in order if index not in taken]
        self._epoch, self._order, self._position = epoch, order, 0
