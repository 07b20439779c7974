"""The output layer's log-prob, entropy and gradients: time, memory and error of each way to get them, side by side.

    python -m benchmarks.output_layer                                        T 1024 to 8192, TP 1 and 2, H 1024, V 151,936, fp32, one thread a rank
    python -m benchmarks.output_layer --device cuda --dtype bfloat16 --tokens 6827 --hidden 2048 --vocab 75968 --rounds 3

Ways: `naive` (log_softmax over all logits, autograd; with TP over the gathered logits), `cross_entropy` (Megatron-Core's vocabulary-parallel one,
and the entropy from the logits), `scores` (`linear_log_prob_and_entropy`), `loss` (`linear_policy_loss`, with gradient only), on a GPU the last
also as `loss, triton`. Each runs in processes of its own, by turns; memory is the peak beyond the inputs and the gradient buffers, on the CPU of
the process, on a GPU of the allocator; time and memory are the slowest rank's. Errors are root mean squares over rows, of log-probs and of the
hidden states' gradient, against float64. On a GPU torch alone is needed, for all ways but `cross_entropy`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
NAIVE_UP_TO, COMPARED_AT = 4096, 2048
"""Most tokens of the naive way (all logits and their gradients are there at once), and those at which all ways are compared."""
LONG = 32_768
TRITON = "loss, triton"
ERROR_ROWS = 128
GOALS: dict[tuple[str, bool], dict[str, float]] = {
    ("scores", False): {"seconds": 0.65, "bytes": 0.1}, ("scores", True): {"seconds": 1.0}, ("loss", True): {"seconds": 0.72}}
"""Most of naive's. The training form's is the smaller of 0.74 of naive's time and 0.84 of the time of slime's fused operator, which took 0.86 of
naive's (28.8 s against 33.6 s, T 2,048, one thread of another machine)."""
GPU_GOALS, GPU_SHAPE = {"milliseconds": 15.0, "gigabytes": 1.5}, (6827, 2048, 75_968, "bfloat16")
Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if dist.is_initialized():
        from megatron.core import tensor_parallel

        logits = tensor_parallel.gather_from_tensor_model_parallel_region(
            tensor_parallel.copy_to_tensor_model_parallel_region(hidden) @ weight.t())
    else:
        logits = hidden @ weight.t()
    log_p = logits.float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On one rank."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = hidden @ weight.t()
    with torch.no_grad():
        log_p = logits.detach().float().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        del log_p
    return -vocab_parallel_cross_entropy(logits[None].clone(), targets[None])[0], entropy


class Pass:
    """One way's pass over the same random inputs on this rank."""

    def __init__(self, way: str, backward: bool, given: argparse.Namespace) -> None:
        self.way, self.backward, self.given = way, backward, given
        (self.tokens,), self.group, rank, size = given.tokens, None, 0, 1
        if way == "cross_entropy" or given.ranks > 1:
            rank, size = _start_megatron(given.ranks)
            self.group = dist.group.WORLD
        generator = torch.Generator(device=given.device).manual_seed(0)
        make = {"generator": generator, "device": given.device}
        dtype, columns = getattr(torch, given.dtype), given.vocab // size
        self.hidden = torch.randn(self.tokens, given.hidden, **make, dtype=dtype).requires_grad_(backward)
        self.targets = torch.randint(0, given.vocab, (self.tokens,), **make)
        self.slope = torch.randn(self.tokens, **make)
        shard = torch.Generator(device=given.device).manual_seed(1 + rank)
        weight = torch.empty(columns, given.hidden, device=given.device, dtype=dtype)  # filled in place: no peak before the one measured
        self.weight = weight.normal_(std=given.hidden**-0.5, generator=shard).requires_grad_(backward)
        if backward and way in ("scores", "loss", TRITON):
            # Where Megatron's DDP keeps gradients; the others leave theirs in .grad, of the same size, which is not counted either.
            self.weight.main_grad, self.weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=given.device), False
        elif backward:
            self.weight.grad = torch.zeros_like(weight)

    def __call__(self, count: int) -> torch.Tensor:
        """Log-probs of the first `count` tokens, gradients where asked for."""
        from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, select_kernels
        from megatron_antisd.parallel.vocab_loss import linear_policy_loss

        self.hidden.grad, slope = None, self.slope[:count]
        if self.way in ("scores", "loss", TRITON):
            self.weight.grad = None  # Megatron's hook would have taken it
        inputs, vocabulary = (self.hidden[:count], self.weight, self.targets[:count]), (self.group, self.given.vocab)
        if self.way in ("loss", TRITON):
            loss, log_prob, _ = linear_policy_loss(*inputs, *vocabulary, lambda rows, part: (slope[rows] * part).sum(),
                                                   chunk_bytes=self.given.chunk_mb << 20,
                                                   kernels=select_kernels("triton" if self.way == TRITON else "torch"))
        elif self.way == "scores":
            log_prob, _ = linear_log_prob_and_entropy(*inputs, *vocabulary, entropy_grad=False)
            loss = (slope * log_prob).sum()
        else:
            log_prob, _ = {"naive": naive, "cross_entropy": cross_entropy}[self.way](*inputs)
            loss = (slope * log_prob).sum()
        if self.backward:
            loss.backward()
        return log_prob.detach()

    def errors(self, log_prob: torch.Tensor) -> dict[str, float]:
        """Root mean squares against float64, on one rank."""
        rows = slice(0, min(ERROR_ROWS, self.tokens))
        weight = self.weight.detach().double()
        table = (self.hidden[rows].detach().double() @ weight.t()).log_softmax(-1)
        exact = table.gather(1, self.targets[rows, None])[:, 0]
        found = {"error": float((log_prob[rows].double() - exact).square().mean().sqrt())}
        if self.backward:
            gradient = table.exp_().neg_()
            gradient.scatter_add_(1, self.targets[rows, None], torch.ones_like(exact)[:, None])
            wanted = gradient.mul_(self.slope[rows, None].double()) @ weight
            found["gradient_error"] = float((self.hidden.grad[rows].double() - wanted).norm() / wanted.norm())
        return found


def measure(way: str, backward: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of one pass on the slowest rank, after a small one that warms up; errors on one rank."""
    run = Pass(way, backward, given)
    for _ in range(3 if given.device == "cuda" else 1):
        run(min(run.tokens, 64))
    _synchronise(given.device)
    before, start = _peak(given.device), time.perf_counter()
    log_prob = run(run.tokens)
    _synchronise(given.device)
    row = {"seconds": time.perf_counter() - start, "bytes": _peak(given.device) - before}
    if given.ranks == 1:
        return row | run.errors(log_prob)
    slowest = torch.tensor([row["seconds"], row["bytes"]], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return dict(zip(row, slowest.tolist(), strict=True))


def _start_megatron(ranks: int) -> tuple[int, int]:
    from megatron.core import parallel_state

    from megatron_antisd.compat import megatron_cpu
    from megatron_antisd.parallel.layout import start_process_group

    start_process_group(600)
    megatron_cpu.install()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    return dist.get_rank(), dist.get_world_size()


def _peak(device: str) -> int:
    """Of this process or, since the last call, of the GPU's allocator; bytes."""
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return max(peak, torch.cuda.memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def best_of(way: str, backward: bool, tokens: int, ranks: int, given: argparse.Namespace) -> dict[str, Any]:
    """The fastest of the rounds, each in fresh processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.output_layer", "--way", way, *(["--backward"] if backward else []),
               "--tokens", str(tokens), "--ranks", str(ranks)]
    for name in ("hidden", "vocab", "chunk_mb", "dtype", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    results = []
    for _ in range(given.rounds):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nended with code {done.returncode}:\n{done.stderr[-3000:]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return min(results, key=lambda row: row["seconds"])


def ways_at(tokens: int, backward: bool, ranks: int, given: argparse.Namespace) -> list[str]:
    ours = ["scores", "loss", *([TRITON] if given.device == "cuda" else [])] if backward else ["scores"]
    if tokens > NAIVE_UP_TO and given.device == "cpu":
        return [*(["loss"] if backward else ["scores"])]
    megatron = tokens == COMPARED_AT and ranks == 1 and given.device == "cpu"
    return ["naive", *(["cross_entropy"] if megatron else []), *ours]


def line(backward: bool, ranks: int, tokens: int, way: str, row: dict[str, Any], base: dict[str, Any] | None, note: str = "") -> str:
    def ratio(key: str) -> str:
        return f"{row[key] / base[key]:.2f}" if base and base[key] else "-"

    error = f"{row['error']:.1e}" if "error" in row else "-"
    gradient = f"{row['gradient_error']:.1e}" if "gradient_error" in row else "-"
    return (f"| {'forward + backward' if backward else 'forward'} | {ranks} | {tokens} | {way}{note} | {row['seconds']:.4g} | {ratio('seconds')} | "
            f"{row['bytes'] / 2**30:.3f} | {ratio('bytes')} | {error} | {gradient} |")


def missed_goals(way: str, backward: bool, row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    missed = [f"{way}, {'forward + backward' if backward else 'forward'}: {key} {row[key] / base[key]:.2f} of naive's, goal {most}"
              for key, most in GOALS.get((way, backward), {}).items() if row[key] > most * base[key]]
    worse = [key for key in ("error", "gradient_error") if key in row and way in ("scores", "loss") and row[key] > 1.05 * base[key]]
    return missed + [f"{way}: {key} {row[key]:.2e}, naive's is {base[key]:.2e}" for key in worse]


def gpu_missed(way: str, row: dict[str, Any], tokens: int, given: argparse.Namespace) -> list[str]:
    """At the shape the goals are for."""
    if (tokens, given.hidden, given.vocab, given.dtype) != GPU_SHAPE:
        return []
    figures = {"milliseconds": row["seconds"] * 1e3, "gigabytes": row["bytes"] / 1e9}
    return [f"{way}: {figures[key]:.2f} {key}, goal {most}" for key, most in GPU_GOALS.items() if way in ("loss", TRITON) and figures[key] > most]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=None, help="tensor-parallel sizes; 2 at 1,024 tokens alone")
    for name, default in (("hidden", 1024), ("vocab", 151936), ("chunk-mb", 512), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help="forward and backward alone, no forward by itself")
    given = parser.parse_args(arguments)
    if given.way:
        (given.ranks,) = given.ranks
        row = measure(given.way, given.backward, given)
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(row))
        return 0
    given.ranks = given.ranks or ([1] if given.device == "cuda" else [1, 2])
    card = torch.cuda.get_device_name() if given.device == "cuda" else f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f}"
    print(f"{card}, torch {torch.__version__}; H {given.hidden}, V {given.vocab}, {given.dtype}, chunks of {given.chunk_mb} MiB in training\n")
    print("| pass | TP | T | way | seconds | to naive | extra GiB | to naive | log-prob error | gradient error |")
    print("|---|---:|---:|---|---:|---:|---:|---:|---:|---:|", flush=True)
    missed: list[str] = []
    for backward, ranks in ((b, r) for b in ((True,) if given.backward else (False, True)) for r in given.ranks):
        tokens_at = given.tokens if ranks == 1 else given.tokens[:1]
        compared = max((t for t in tokens_at if t <= NAIVE_UP_TO), key=lambda t: (t <= COMPARED_AT, t), default=None)
        for tokens in tokens_at:
            found = {way: best_of(way, backward, tokens, ranks, given) for way in ways_at(tokens, backward, ranks, given)}
            base = found.get("naive")
            for way, row in found.items():
                print(line(backward, ranks, tokens, way, row, base), flush=True)
                if given.device == "cuda" and backward:
                    missed += gpu_missed(way, row, tokens, given)
                elif base and tokens == compared:
                    missed += missed_goals(way, backward, row, base)
        if tokens_at[-1] > NAIVE_UP_TO and given.device == "cpu":
            way, row = next(iter(found.items()))
            scale = LONG / tokens_at[-1]
            longer = {"seconds": row["seconds"] * scale, "bytes": row["bytes"] * scale}
            print(line(backward, ranks, LONG, way, longer, None, note=" (extrapolated: all of it in proportion to T)"), flush=True)
    print("\n" + "\n".join(f"MISSED {text}" for text in missed) if missed else "\nall goals reached")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
