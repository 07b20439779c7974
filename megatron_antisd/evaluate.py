"""Evaluation: samples of a benchmark's problems -> `eval/<benchmark>/...` metrics, fractions from 0 to 1.

    torchrun --nproc-per-node N -m megatron_antisd.evaluate CONFIG.yaml [key=value ...]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch.distributed as dist

from megatron_antisd.config import ConfigError, load_config
from megatron_antisd.grading.groups import grade_groups
from megatron_antisd.metrics import MetricsWriter
from megatron_antisd.records import RolloutGroup
from megatron_antisd.rollout.engine import Sampling
from megatron_antisd.rollout.groups import generate_groups
from megatron_antisd.run import SETUP_ERRORS, Run, build_run, set_up_logging

EVALUATION_SEED = 20_000_000
"""Added to the run's seed: evaluations draw the same numbers at every step, and none that training draws."""


def is_due(run: Run, step: int) -> bool:
    return bool(run.benchmarks) and (step % run.config.evaluation.every == 0 or step == run.config.run.steps)


def evaluate(run: Run, metrics: MetricsWriter, step: int) -> None:
    """Sample every benchmark with the engine's present policy, grade, and log. Collective. A truncated response counts as graded."""
    settings = run.config.evaluation
    sampling = Sampling(
        temperature=settings.temperature, top_p=settings.top_p, max_new_tokens=settings.max_new_tokens or run.config.rollout.max_new_tokens,
        stop_token_ids=run.sampling.stop_token_ids)
    values: dict[str, float] = {}
    for benchmark in settings.benchmarks:
        problems = run.benchmarks[benchmark.name]
        groups = generate_groups(
            run.engine, problems, [run.prompts.student_prompt(p) for p in problems], sampling=sampling, group_size=benchmark.samples,
            seed=run.config.run.seed + EVALUATION_SEED, step=0, decode=run.decode)
        graded = grade_groups(groups, run.grader, run.config.privileged).groups
        values |= summarise(
            benchmark.name, [[r.reward >= 1.0 for r in g.rollouts] for g in graded],
            truncated=[[r.truncated for r in g.rollouts] for g in graded],
            response_lengths=[[len(r.response_ids) for r in g.rollouts] for g in graded])
        metrics.log_samples(step, _samples_of(benchmark.name, graded[: run.config.logging.samples_per_evaluation]))
    if values:
        metrics.log_evaluation(step, values)


def _samples_of(benchmark: str, groups: Sequence[RolloutGroup]) -> list[dict[str, object]]:
    """The first rollout of each group, as text."""
    return [{"benchmark": benchmark, "problem_id": g.problem.id, "prompt": g.problem.prompt, "response": g.rollouts[0].text,
             "reward": g.rollouts[0].reward, "truncated": g.rollouts[0].truncated} for g in groups]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k samples is correct, from n samples of which c are.

    1 - C(n-c, k) / C(n, k), the share of k-subsets with a correct sample (Chen et al., arXiv 2107.03374, section 2.1),
    as the product of (1 - k/i) over i = n-c+1 .. n: no binomial is formed, so large n neither overflows nor cancels.
    """
    for name, value in (("n", n), ("c", c), ("k", k)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"pass_at_k: {name} is {value!r}, expected an integer")
    if c < 0 or c > n:
        raise ValueError(f"pass_at_k: c = {c} correct of n = {n} samples, expected 0 <= c <= n")
    if k < 1 or k > n:
        raise ValueError(f"pass_at_k: k = {k} with n = {n} samples, expected 1 <= k <= n; draw at least k samples a problem")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def avg_at_k(correct: Sequence[Sequence[bool]]) -> float:
    """Mean over problems of the share of correct samples; k, the number of samples, is the same for every problem."""
    samples = _sample_count("avg_at_k", correct)
    return sum(_count(problem) for problem in correct) / (len(correct) * samples)


def summarise(
    benchmark: str,
    correct: Sequence[Sequence[bool]],
    *,
    truncated: Sequence[Sequence[bool]],
    response_lengths: Sequence[Sequence[int]],
) -> dict[str, float]:
    """The metrics of one evaluation; all three arguments are [problems][samples], every problem with as many samples.

    Keys, with k = samples: `eval/<benchmark>/avg@k`, `pass@1`, `pass@2`, `pass@4`, ... and `pass@k`, `truncation_rate`
    and `response_length_mean` (tokens).
    """
    samples = _sample_count(f"evaluation of {benchmark!r}", correct)
    for name, values in (("truncated", truncated), ("response_lengths", response_lengths)):
        shape = [len(problem) for problem in values]
        if shape != [samples] * len(correct):
            raise ValueError(
                f"evaluation of {benchmark!r}: {name} has {shape} samples a problem, expected {samples} for each of {len(correct)} problems"
            )
    prefix = f"eval/{benchmark}"
    counts = [_count(problem) for problem in correct]
    metrics = {f"{prefix}/avg@{samples}": avg_at_k(correct)}
    for k in _ks(samples):
        metrics[f"{prefix}/pass@{k}"] = sum(pass_at_k(samples, c, k) for c in counts) / len(counts)
    total = len(correct) * samples
    metrics[f"{prefix}/truncation_rate"] = sum(_count(problem) for problem in truncated) / total
    metrics[f"{prefix}/response_length_mean"] = sum(sum(problem) for problem in response_lengths) / total
    return metrics


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... below `samples`, then `samples` itself."""
    return [1 << power for power in range((samples - 1).bit_length())] + [samples]


def _sample_count(what: str, correct: Sequence[Sequence[bool]]) -> int:
    """The number of samples a problem; raises unless there is at least one and it is the same for every problem."""
    sizes = {len(problem) for problem in correct}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"{what}: {len(correct)} problems with {sorted(sizes)} samples, expected problems with equally many samples, at least one"
        )
    return sizes.pop()


def _count(problem: Sequence[bool]) -> int:
    """How many are true. A missing value or a fractional reward is an error, not "wrong"."""
    unknown = [value for value in problem if value not in (0, 1)]
    if unknown:
        raise ValueError(f"expected True or False (or 1.0 or 0.0) for each sample, got {unknown[0]!r}; decide what counts as correct first")
    return sum(map(bool, problem))


def main(arguments: Sequence[str]) -> None:
    """Evaluate the policy that a training run of this configuration would continue with; one row in `evaluation/metrics.jsonl`."""
    if not arguments:
        sys.exit("usage: torchrun --nproc-per-node N -m megatron_antisd.evaluate CONFIG.yaml [key=value ...]")
    set_up_logging()
    try:
        config = load_config(arguments[0], arguments[1:])
        if not config.evaluation.benchmarks:
            raise ConfigError("evaluation.benchmarks is empty: there is nothing to evaluate; list at least one name and path")
        run = build_run(config)
    except SETUP_ERRORS as error:
        sys.exit(f"configuration error: {error}")
    with MetricsWriter(run.config.directory / "evaluation", config=run.config.logging, total_steps=run.config.run.steps, resume_step=None,
                       run_name=run.config.run.name, is_writer=run.is_main) as metrics:
        evaluate(run, metrics, run.progress.step)
    run.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
