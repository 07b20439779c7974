"""What long responses cost a step, and what the options of `tails` and `asynchrony` give back. A simulation: nothing is decoded.

    python -m benchmarks.tails [--engines 64 512]

Lengths. log-normal with a cap, as DAPO's are by shape (Yu et al. 2025: 16,384 tokens expected, 4,096 more until the cut, a mean that grows from about
1,000 to several thousand in training). The parameters are ours, chosen for its later steps: mean 4,700, 2.1 % at the cap. Half of the
variance of log-length belongs to the problem: that part is what `longest_first` can know of.

Engines. 64 responses of 8 groups each a step, 32 decoded at once (two waves), or all of them. A decoding step with n sequences takes 1 + n / 64
units: reading the weights, plus the sequences' own part; only ratios are reported. Training takes half as long as generation does at its best (no
slot idle), and generation waits for it unless staleness is allowed: slots are idle then, too.

Goals: longest_first, and staleness 1, never make a step longer; over-sampling that counts over all engines makes it shorter.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_antisd.rollout.engine import Quota, Request
from megatron_antisd.rollout.spreading import spread

CAP = 20_480
MEDIAN, SIGMA = 3_300.0, 0.9
PROBLEM_SHARE = 0.5
GROUP, PER_ENGINE = 8, 64
SLOTS = (32, 80)
OVERSAMPLE = 1.25
STEPS, WARM = 5, 1
"""Simulated, and left out at the beginning."""


def decode_seconds(sequences: int) -> float:
    """Of one token of each of them."""
    return 1.0 + sequences / 64


@dataclass
class Engine:
    """Decodes up to `slots` responses, first come first served. Every running response has had as many tokens as the clock went on since it began."""

    slots: int
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    """(batch, group, tokens), the next one last."""
    running: list[tuple[float, int, int]] = field(default_factory=list)
    """Heap of (clock at its end, batch, group)."""
    clock: float = 0.0
    """Tokens that a response would have that runs since the beginning."""
    now: float = 0.0
    slot_time: float = 0.0
    """Of all slots, in use."""
    version: int = 0
    """Counts changes of what runs: an end that was foreseen before is void."""

    def advance(self, now: float) -> None:
        if self.running:
            self.clock += (now - self.now) / decode_seconds(len(self.running))
            self.slot_time += (now - self.now) * len(self.running)
        self.now = now

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            batch, group, tokens = self.waiting.pop()
            heapq.heappush(self.running, (self.clock + tokens, batch, group))
        self.version += 1

    def next_end(self) -> float | None:
        return self.now + (self.running[0][0] - self.clock) * decode_seconds(len(self.running)) if self.running else None


@dataclass(frozen=True)
class Option:
    name: str
    oversample: float = 1.0
    shared_quota: bool = False
    """The quota counts over all engines, as with engine servers and one trainer rank; else each engine stops at its share."""
    longest_first: bool = False
    staleness: int = 0
    goal: float = np.inf
    """Largest time of a step against that of no option."""


OPTIONS = (
    Option("as it is"),
    Option("longest_first", longest_first=True, goal=1.0),
    Option(f"oversample {OVERSAMPLE:g}, a share each", oversample=OVERSAMPLE),
    Option(f"oversample {OVERSAMPLE:g}, all together", oversample=OVERSAMPLE, shared_quota=True, goal=0.98),
    Option("both, a share each", oversample=OVERSAMPLE, longest_first=True),
    Option("staleness 1", staleness=1, goal=1.0),
)


def lengths(draw: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """([groups, GROUP] tokens, [groups] what earlier rollouts of the problem had on average)."""
    problem = draw.normal(0, SIGMA * PROBLEM_SHARE**0.5, (groups, 1))

    def sample() -> np.ndarray:
        log_length = np.log(MEDIAN) + problem + draw.normal(0, SIGMA * (1 - PROBLEM_SHARE) ** 0.5, (groups, GROUP))
        return np.clip(np.exp(log_length), 1, CAP).astype(int)

    return sample(), sample().mean(axis=1)


class Simulation:
    """Generation of batch after batch on `engines`, and training on one batch at a time."""

    def __init__(self, option: Option, engines: int, slots: int, train_seconds: float, seed: int) -> None:
        self.option, self.engines, self.train_seconds = option, [Engine(slots) for _ in range(engines)], train_seconds
        self.slots = slots * engines
        self.groups = engines * PER_ENGINE // GROUP
        self.draw = np.random.default_rng(seed)
        self.left: dict[tuple[int, int], int] = {}
        """Responses of (batch, group) under way or to come."""
        self.missing: dict[tuple[int, int], int] = {}
        """Groups that (batch, engine, or -1 for all) still waits for."""
        self.home: dict[tuple[int, int], int] = {}
        self.ends: list[tuple[float, int, int]] = []
        """Heap of (time, engine, version)."""
        self.generated, self.trained, self.kept_tokens = {}, {}, 0

    def release(self, batch: int, now: float) -> None:
        """Hand the batch's requests to the engines, spread by the project's own code."""
        started = round(self.groups * self.option.oversample)
        tokens, known = lengths(self.draw, started)
        requests = [Request(prompt_ids=(g,), seed=0, expected_tokens=int(known[g]) if self.option.longest_first else None)
                    for g in range(started) for _ in range(GROUP)]
        parts = spread(requests, len(self.engines), Quota(groups=self.groups, group_size=GROUP))
        for e, (engine, part) in enumerate(zip(self.engines, parts, strict=True)):
            engine.advance(now)
            new = [(batch, i // GROUP, int(tokens[i // GROUP, i % GROUP])) for i in part.indices]
            engine.waiting = new[::-1] + engine.waiting
            self.left |= {(batch, i // GROUP): GROUP for i in part.indices}
            self.home |= {(batch, i // GROUP): -1 if self.option.shared_quota else e for i in part.indices}
            if part.quota and not self.option.shared_quota:
                self.missing[batch, e] = part.quota
            self.refill(e)
        if self.option.shared_quota:
            self.missing[batch, -1] = self.groups

    def refill(self, e: int) -> None:
        self.engines[e].fill()
        end = self.engines[e].next_end()
        if end is not None:
            heapq.heappush(self.ends, (end, e, self.engines[e].version))

    def end_of_response(self, e: int, now: float) -> None:
        engine = self.engines[e]
        engine.advance(now)
        _, batch, group = heapq.heappop(engine.running)
        self.left[batch, group] -= 1
        key = (batch, self.home[batch, group])
        if not self.left[batch, group] and key in self.missing:
            self.missing[key] -= 1
            if not self.missing[key]:
                del self.missing[key]
                self.give_up(batch, now, None if self.option.shared_quota else e)
                if not any(of == batch for of, _ in self.missing):
                    self.generated[batch] = now
        self.refill(e)

    def give_up(self, batch: int, now: float, only: int | None) -> None:
        for e, engine in enumerate(self.engines):
            if only in (None, e):
                engine.advance(now)
                engine.waiting = [each for each in engine.waiting if each[0] != batch]
                engine.running = [each for each in engine.running if each[1] != batch]
                heapq.heapify(engine.running)
                if only is None:
                    self.refill(e)

    def run(self) -> tuple[float, float]:
        """(seconds a step, share of engine slots without a response) over the steps behind the warm-up."""
        released, last, begin = 0, STEPS + WARM, (0.0, 0.0)
        now = 0.0
        while len(self.trained) < last:
            # Batch k trains version k into k + 1; with staleness s it may be drawn by version k - s.
            while released < last and released - self.option.staleness <= self._versions(now):
                self.release(released, now)
                released += 1
            now = min([self.ends[0][0] if self.ends else np.inf, *(t for t in self.trained.values() if t > now)])
            while self.ends and self.ends[0][0] <= now:
                _, e, version = heapq.heappop(self.ends)
                if version == self.engines[e].version:
                    self.end_of_response(e, now)
            batch = len(self.trained)
            if batch in self.generated and self._versions(now) == batch:
                self.trained[batch] = max(now, self.generated[batch]) + self.train_seconds
            if len(self.trained) == WARM and begin[0] == 0.0 and self._versions(now) == WARM:
                begin = (now, self._slot_time(now))
        end = self.trained[last - 1]
        used = (self._slot_time(end) - begin[1]) / ((end - begin[0]) * self.slots)
        return (end - begin[0]) / STEPS, 1 - used

    def _versions(self, now: float) -> int:
        return sum(t <= now for t in self.trained.values())

    def _slot_time(self, now: float) -> float:
        for engine in self.engines:
            engine.advance(now)
        return sum(engine.slot_time for engine in self.engines)


def simulate(engines: int, slots: int, option: Option, seed: int = 0) -> tuple[float, float]:
    tokens, _ = lengths(np.random.default_rng(seed), engines * PER_ENGINE // GROUP)
    at_once = min(slots, PER_ENGINE)
    best = float(tokens.sum()) / (engines * at_once) * decode_seconds(at_once)
    return Simulation(option, engines, slots, best / 2, seed).run()


def table(counts: Sequence[int]) -> list[str]:
    """Print it; the goals that are missed."""
    sample, _ = lengths(np.random.default_rng(1), 20_000)
    print(f"Lengths: mean {sample.mean():,.0f}, median {np.median(sample):,.0f}, 95 % below {np.quantile(sample, 0.95):,.0f}, "
          f"{(sample >= CAP).mean():.1%} at the cap of {CAP:,}\n")
    print("| engines | at once | option | time of a step | slots idle |\n|---|---|---|---|---|")
    missed = []
    for engines in counts:
        for slots in SLOTS:
            seconds, _ = simulate(engines, slots, OPTIONS[0])
            for option in OPTIONS:
                own, idle = simulate(engines, slots, option)
                ratio = own / seconds
                if ratio > option.goal + 1e-9:
                    missed.append(f"{engines} engines, {slots} at once: {option.name} takes {ratio:.3f}, the goal is {option.goal:g}")
                print(f"| {engines} | {slots} | {option.name} | {ratio:.2f} | {idle:.0%} |", flush=True)
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, nargs="+", default=[64, 512])
    if missed := table(parser.parse_args().engines):
        sys.exit("goals missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
