"""The output layer's log-prob, entropy and gradients: time and memory of each way to get them, side by side.

    python -m benchmarks.output_layer                                          T 1024, 2048, H 1024, V 151,936, fp32, one thread
    python -m benchmarks.output_layer --device cuda --dtype bfloat16 --tokens 6827 --hidden 2048 --vocab 75968

Ways: `naive` (log_softmax over all logits, autograd), `cross_entropy` (Megatron-Core's vocabulary-parallel one, and the entropy from the logits),
`scores` (`linear_log_prob_and_entropy`), `loss` (`linear_policy_loss`, with gradient only). Each runs in a process of its own, by turns; memory is
the peak beyond the inputs and the gradient buffers, on the CPU of the process, on a GPU of the allocator. The error is the largest of
log-probs against float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.launch import ROOT, machine

GOALS = {("scores", False): ("time", 0.65), ("scores", True): ("time", 1.0), ("loss", True): ("time", 0.74)}
WAYS = {False: ("naive", "cross_entropy", "scores"), True: ("naive", "cross_entropy", "scores", "loss")}


def naive(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (hidden @ weight.t()).float().log_softmax(dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits = hidden @ weight.t()
    with torch.no_grad():
        log_p = logits.detach().float().log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        del log_p
    return -vocab_parallel_cross_entropy(logits[None].clone(), targets[None])[0], entropy


def measure(way: str, backward: bool, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of one pass, after a small one that warms up."""
    from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy
    from megatron_antisd.parallel.vocab_loss import linear_policy_loss

    if way == "cross_entropy":
        _one_rank_of_megatron()
    dtype = getattr(torch, given.dtype)
    generator = torch.Generator(device=given.device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, device=given.device, dtype=dtype)  # noqa: E731
    weight = make(given.vocab, given.hidden).mul_(given.hidden**-0.5).requires_grad_(backward)  # in place: no peak before the one measured
    hidden = make(given.tokens, given.hidden).requires_grad_(backward)
    targets = torch.randint(0, given.vocab, (given.tokens,), generator=generator, device=given.device)
    slope = torch.randn(given.tokens, generator=generator, device=given.device)
    if backward and way in ("scores", "loss"):
        # Where Megatron's DDP keeps gradients; the others leave theirs in .grad, of the same size, which is not counted either.
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(weight.shape, device=given.device), False
    elif backward:
        weight.grad = torch.zeros_like(weight)
    options = {"chunk_tokens": given.chunk}
    ways: dict[str, Callable[..., Any]] = {
        "naive": naive, "cross_entropy": cross_entropy,
        "scores": lambda h, w, t: linear_log_prob_and_entropy(h, w, t, None, given.vocab, entropy_grad=False, **options)}

    def run(count: int) -> torch.Tensor:
        if way == "loss":
            loss, log_prob, _ = linear_policy_loss(hidden[:count], weight, targets[:count], None, given.vocab,
                                                   lambda rows, part: (slope[:count][rows] * part).sum(), **options)
        else:
            log_prob, _ = ways[way](hidden[:count], weight, targets[:count])
            loss = (slope[:count] * log_prob).sum()
        if backward:
            loss.backward()
        return log_prob.detach()

    run(8)
    hidden.grad = None
    _synchronise(given.device)
    before, start = _peak(given.device), time.perf_counter()
    log_prob = run(given.tokens)
    _synchronise(given.device)
    seconds, extra = time.perf_counter() - start, _peak(given.device) - before
    rows = slice(0, 64)
    exact = (hidden[rows].detach().double() @ weight.detach().double().t()).log_softmax(-1).gather(1, targets[rows, None])[:, 0]
    return {"seconds": seconds, "bytes": extra, "error": float((log_prob[rows].double() - exact).abs().max())}


def _one_rank_of_megatron() -> None:
    from megatron.core import parallel_state

    from megatron_antisd.compat import megatron_cpu
    from megatron_antisd.parallel.layout import start_process_group

    start_process_group(60)
    megatron_cpu.install()
    parallel_state.initialize_model_parallel()


def _peak(device: str) -> int:
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak if torch.cuda.memory_allocated() == 0 else max(peak, torch.cuda.memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    for name, default in (("hidden", 1024), ("vocab", 151936), ("chunk", 256), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.way:
        (given.tokens,) = given.tokens
        torch.set_num_threads(1)
        print(json.dumps(measure(given.way, given.backward, given)))
        return 0
    print(f"{machine()}; H {given.hidden}, V {given.vocab}, {given.dtype}, chunks of {given.chunk} tokens, one thread\n")
    print("| pass | T | way | seconds | to naive | extra GiB | to naive | error |\n|---|---:|---|---:|---:|---:|---:|---:|", flush=True)
    missed = False
    for backward in (False, True):
        for tokens in given.tokens:
            found = {way: _best(way, backward, tokens, given) for way in WAYS[backward]}
            for way, row in found.items():
                ratio = {key: row[key] / found["naive"][key] for key in ("seconds", "bytes")}
                goal = GOALS.get((way, backward))
                missed |= goal is not None and ratio["seconds"] > goal[1]
                print(f"| {'forward + backward' if backward else 'forward'} | {tokens} | {way} | {row['seconds']:.2f} | {ratio['seconds']:.2f} | "
                      f"{row['bytes'] / 2**30:.2f} | {ratio['bytes']:.2f} | {row['error']:.1e} |", flush=True)
    return int(missed)


def _best(way: str, backward: bool, tokens: int, given: argparse.Namespace) -> dict[str, Any]:
    """The fastest of the rounds."""
    command = [sys.executable, "-m", "benchmarks.output_layer", "--way", way, *(["--backward"] if backward else []), "--tokens", str(tokens)]
    for name in ("hidden", "vocab", "chunk", "dtype", "device"):
        command += [f"--{name}", str(getattr(given, name))]
    results = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(given.rounds)]
    return min((json.loads(text.splitlines()[-1]) for text in results), key=lambda row: row["seconds"])


if __name__ == "__main__":
    sys.exit(main())
