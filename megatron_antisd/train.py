"""Anti-Self-Distillation, Algorithm 1 of arXiv 2605.11609, as a loop.

    torchrun --nproc-per-node N -m megatron_antisd.train CONFIG.yaml [key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_antisd import keeping, stages
from megatron_antisd.config import load_config
from megatron_antisd.evaluate import evaluate, is_due, is_pending
from megatron_antisd.keeping import supervised
from megatron_antisd.metrics import MetricsWriter, StageTimer, StepProfiler
from megatron_antisd.resume import restore, write_config
from megatron_antisd.run import SETUP_ERRORS, Run, build_run, set_up_logging
from megatron_antisd.supervision.preemption import Preempted


def train(run: Run, metrics: MetricsWriter) -> None:
    """Steps `run.progress.step + 1` to `config.run.steps`. Raises Preempted between two stages when the run is asked to stop."""
    if is_pending(run, metrics, run.progress.step):  # before the first step, or where the last process was interrupted
        evaluate(run, metrics, run.progress.step)
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else None
    profile = StepProfiler(run.config.profile, run.config.directory, rank=dist.get_rank(), barrier=dist.barrier)
    while run.progress.step < run.config.run.steps:
        step = run.progress.step + 1
        with profile(step) as named_range, StageTimer(synchronize, supervised(run, step, named_range)) as timer:
            with timer("generate"):  # y_1 .. y_G ~ pi_S(. | x)
                groups, grading = stages.generate(run, step)
            with timer("grade"):  # R_i and the feedback on it
                graded = stages.grade(run, groups, grading, step)
            with timer("teacher"):  # t_t = log pi_T(y_t | x, c, y_<t) and exact entropies
                graded = stages.route(run, graded, step)  # in which experts the update computes
                teacher = stages.score_teacher(run, graded.groups, step)
                student = stages.score_student(run, graded.groups, step)
            with timer("gate"):  # lambda = g * lambda_max
                gate = stages.decide_gate(run, teacher, student)
                lambda_ = gate.lambda_ if gate is not None and not run.config.algorithm.shadow else 0.0
            with timer("step"):  # A_i,t = A_seq_i - lambda phi(u_i,t), clipped policy gradient
                batches, stats = stages.update(run, graded.groups, teacher, student, lambda_, step)
            with timer("sync"):  # the new policy into the engine
                probe = stages.sync(run, stats)
            with timer("figures"):
                row = stages.figures(run, graded, teacher, gate, lambda_, batches, stats, probe)
        seconds = timer.seconds()
        metrics.log(step, {**row, "tokens_per_second": row["tokens"] / seconds["seconds_total"], **seconds})
        metrics.log_routing(step, run.routing.layers(stats))
        if keeping.act_on_incidents(run, metrics, graded.groups, step):
            continue  # at the checkpoint it went back to
        if is_due(run, step):
            metrics.log_token_u(step, stages.token_u(run, graded.groups, teacher, batches, stats))
            metrics.log_rollouts(step, run.config.algorithm.method, stages.rollouts(run, graded.groups, teacher, batches, stats), run.token_text)
        keeping.save(run, metrics)
        keeping.pause(run)
        if is_due(run, step):  # after the checkpoint: an evaluation that is interrupted loses no training
            evaluate(run, metrics, step)


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        sys.exit("usage: torchrun --nproc-per-node N -m megatron_antisd.train CONFIG.yaml [key=value ...]")
    set_up_logging()
    try:
        run = restore(build_run(load_config(arguments[0], arguments[1:])))
    except SETUP_ERRORS as error:
        sys.exit(f"configuration error: {error}")
    config = run.config
    write_config(run)
    first = run.progress.step + 1 if run.resumed else None
    with run, MetricsWriter(config.directory, config=config.logging, total_steps=config.run.steps, resume_step=first, run_name=config.run.name,
                            is_writer=run.is_main, patient=config.checkpoint.on_failure == "continue") as metrics:
        try:
            train(run, metrics)
            keeping.finish(run)
        except Preempted as reason:
            keeping.leave(run, metrics, reason)
        except Exception as error:
            run.tell(error)  # before anything is closed, which may take long: the others wait for this rank
            raise
        if config.checkpoint.save_hf:
            with run.supervisor.stage("save"):
                run.save_huggingface(config.directory / "hf")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
