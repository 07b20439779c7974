"""The gate's exact global median of entropies, gathered or selected: `python -m benchmarks.median [--ranks 2 4] [--tokens 16384 2097152]`.

After a scoring pass every rank needs the log-probs of all tokens and the median of their entropies. `gather` sums zero-filled log-probs and
entropies over the ranks in one [2, T] all-reduce and takes the median of all T entropies on every rank. `select` sums the log-probs alone and
selects among each rank's own entropies by counts (`megatron_antisd/parallel/statistics.py`). The price of the median is what a way costs
beyond `log-probs alone`.

Real gloo ranks, one thread each; shares are uneven. The ways run by turns; a time is the median over rounds of the slowest rank's. Bytes are
what a rank sends in a ring all-reduce, 2 (n - 1) / n of the vector. Every result is held against torch's median of everything, bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from benchmarks.launch import ROOT, machine
from megatron_antisd.parallel.statistics import DIGITS, lower_median

ALONE, GATHER, SELECT = "log-probs alone", "gather", "select"
TOKENS = tuple(1 << power for power in (14, 16, 18, 20, 21, 23))


def shared(rows: Sequence[torch.Tensor], where: torch.Tensor, total: int, group: dist.ProcessGroup) -> torch.Tensor:
    """[len(rows), total] on every rank, as `Trainer._assemble`; `where` are the places of this rank's values."""
    everything = torch.zeros(len(rows), total)
    everything[:, where] = torch.stack(list(rows))
    dist.all_reduce(everything, group=group)
    return everything


def shares(total: int, ranks: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Places of each rank's tokens: whole runs of up to 512, dealt at random, so shares are uneven."""
    owner = torch.randint(0, ranks, (-(-total // 512),), generator=generator).repeat_interleave(512)[:total]
    return [(owner == rank).nonzero()[:, 0] for rank in range(ranks)]


def ways_of(log_prob: torch.Tensor, entropy: torch.Tensor, where: torch.Tensor, total: int) -> dict[str, Callable[[], float | None]]:
    """Each way as a call that returns the median; `log_prob`, `entropy` and `where` are this rank's."""
    group = dist.group.WORLD

    def select() -> float | None:
        shared([log_prob], where, total, group)
        return lower_median(entropy, group)

    return {ALONE: lambda: float(shared([log_prob], where, total, group)[0, 0]), SELECT: select,
            GATHER: lambda: float(shared([log_prob, entropy], where, total, group)[1].median())}


def measure(total: int, rounds: int) -> dict[str, float]:
    """Seconds of every way on these ranks. Raises RuntimeError where one is not torch's median of everything."""
    generator = torch.Generator().manual_seed(total)
    entropies = torch.empty(total).exponential_(2.0, generator=generator)
    entropies[torch.rand(total, generator=generator) < 0.2] = 0.0  # certain tokens: many ties
    where = shares(total, dist.get_world_size(), generator)[dist.get_rank()]
    calls = ways_of(-entropies[where], entropies[where], where, total)
    expected = float(entropies.median())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            dist.barrier()
            start = time.perf_counter()
            result = calls[name]()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if name != ALONE and result != expected:
                raise RuntimeError(f"{name}, {total} tokens, rank {dist.get_rank()}: the median is {result!r}, torch's of everything {expected!r}")
            if number:  # the first round warms up
                seconds[name].append(float(taken))
    return {name: statistics.median(values) for name, values in seconds.items()}


def bytes_for_median(way: str, total: int, ranks: int) -> float:
    """Sent by each rank beyond the log-probs."""
    vector = 4 * total if way == GATHER else sum(8 << bits for bits in DIGITS)
    return 2 * (ranks - 1) / ranks * vector


def on_ranks(tokens: Sequence[int], rounds: int) -> None:
    """One of torchrun's processes: measure, rank 0 prints the rows."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    for total in tokens:
        seconds = measure(total, rounds)
        if dist.get_rank() == 0:
            floor = seconds.pop(ALONE)
            price = {way: 1e3 * (taken - floor) for way, taken in seconds.items()}
            sent = {way: bytes_for_median(way, total, ranks) / 1e6 for way in seconds}
            cells = [f"{1e3 * floor:.1f}", *(f"{figures[way]:.{digits}f}" for figures, digits in ((price, 1), (sent, 2)) for way in (GATHER, SELECT))]
            print(f"| {ranks} | {total} | {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--on-ranks", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.on_ranks:
        on_ranks(given.tokens, given.rounds)
        return 0
    print(f"{machine()}; gloo, one thread a rank\n")
    columns = ("ranks", "tokens", "log-probs alone, ms", "+ gather, ms", "+ select, ms", "gather, MB a rank", "select, MB a rank")
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}", flush=True)
    for ranks in given.ranks:
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "benchmarks.median",
                        "--on-ranks", "--rounds", str(given.rounds), "--tokens", *map(str, given.tokens)], cwd=ROOT, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
