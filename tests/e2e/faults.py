"""Training with something done to it. Usage: faults.py FAULT CONFIG.yaml [key=value ...]; the faults are the functions below."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

NAN_SEQUENCE, NAN_FORWARD, INFINITE_GRADIENT = 2, 4, 5


def score_at_the_end(output: str) -> None:
    """No fault: write the final policy's scores of the usual views."""
    from tiny import make_views

    from megatron_antisd.run import Run

    free = Run._free

    def score_and_free(self: Run) -> None:
        scores = self.trainer.score(make_views(), gather_entropy=True)
        if self.is_main:
            torch.save((scores.log_prob, scores.entropy), output)
        free(self)

    Run._free = score_and_free


def not_finite() -> None:
    """Steps 2, 4 and 5 break, each in another way and on the last rank only; the weights must not notice."""
    from megatron_antisd.compat import megatron_cpu

    install = megatron_cpu.install

    def install_and_break() -> None:
        install()
        import megatron_antisd.parallel.trainer as module

        _break_steps(module)

    megatron_cpu.install = install_and_break


def _break_steps(module: Any) -> None:
    count = {"step": 0}
    step, predicting, update = module.Trainer.step, module.Trainer._predicting, module.guarded_update
    last = dist.get_rank() == dist.get_world_size() - 1

    def broken_step(self: Any, batch: Any, learning_rate: float, **options: Any) -> Any:
        count["step"] += 1
        if count["step"] == NAN_SEQUENCE:
            advantage = batch.sequence_advantage.clone()
            advantage[3] = float("nan")  # one sequence of sixteen: one data-parallel rank meets it
            batch = dataclasses.replace(batch, sequence_advantage=advantage)
        before = {name: tensor.clone() for name, tensor in self.export()}
        stats = step(self, batch, learning_rate, **options)
        after = dict(self.export())
        unchanged = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert unchanged == stats.skipped, f"step {count['step']}: skipped {stats.skipped}, weights unchanged {unchanged}"
        return stats

    def broken_hidden(self: Any, row: Any, hidden: torch.Tensor) -> torch.Tensor:
        given = predicting(self, row, hidden)
        return given * float("nan") if count["step"] == NAN_FORWARD and given.requires_grad and last else given

    def broken_update(optimizer: Any, clip_grad: float, **options: Any) -> Any:
        if count["step"] == INFINITE_GRADIENT and last:
            for buffer in broken_update.trainer.ddp[0].buffers:
                buffer.grad_data.fill_(float("inf"))
        return update(optimizer, clip_grad, **options)

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        broken_update.trainer = self

    initialise = module.Trainer.__init__
    module.Trainer.__init__, module.Trainer.step, module.Trainer._predicting = remember, broken_step, broken_hidden
    module.guarded_update = broken_update


def gradient_spikes(update: str) -> None:
    """The gradient of this update of the process is ten thousand times as large."""
    from megatron_antisd.compat import megatron_cpu

    install = megatron_cpu.install

    def install_and_spike() -> None:
        install()
        import megatron_antisd.parallel.trainer as module

        count, guarded, initialise = {"update": 0}, module.guarded_update, module.Trainer.__init__

        def remember(self: Any, *arguments: Any, **options: Any) -> None:
            initialise(self, *arguments, **options)
            spiking.trainer = self

        def spiking(optimizer: Any, *arguments: Any, **options: Any) -> Any:
            count["update"] += 1
            if count["update"] == int(update):
                for chunk in spiking.trainer.ddp:
                    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
                        buffer.grad_data.mul_(1e4)
            return guarded(optimizer, *arguments, **options)

        module.Trainer.__init__, module.guarded_update = remember, spiking

    megatron_cpu.install = install_and_spike


def engine_dies(step: str) -> None:
    """vLLM fails on the last rank when it generates for this step."""
    from megatron_antisd.rollout.vllm_engine import VllmEngine

    generate = VllmEngine._generate

    def failing(self: VllmEngine, requests: Any, sampling: Any, *rest: Any) -> Any:
        if self.policy_version == int(step) - 1 and not sampling.ignore_eos and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("the engine core died unexpectedly")
        return generate(self, requests, sampling, *rest)

    VllmEngine._generate = failing


def main() -> None:
    from megatron_antisd.train import main as train

    fault, *arguments = sys.argv[1:]
    name, _, value = fault.partition("=")
    globals()[name](*([value] if value else []))
    train(arguments)


if __name__ == "__main__":
    main()
