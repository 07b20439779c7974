"""Training with engines and graders that fail on the way. Usage: restart_faults.py FAULT[,FAULT...] CONFIG.yaml [key=value ...]; the faults are the
functions below, `name=STEP`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

FIFTH = 5


def none() -> None:
    """No fault: the run to compare with."""


def engine_dies_once(step: str) -> None:
    """vLLM raises in the middle of this step's generation, on the last rank."""
    _in_the_middle(int(step), _die, times=1)


def engine_hangs_once(step: str) -> None:
    """vLLM never answers in the middle of this step's generation, on the last rank."""
    _in_the_middle(int(step), _hang, times=1)


def engine_always_dies(step: str) -> None:
    """From this step on, on the last rank, whenever it generates."""
    _in_the_middle(int(step), _die, times=1000)


def evaluation_fails(step: str) -> None:
    """Engine and graders, in the evaluation after this step's update: the engine on the last rank, the graders of rank 0."""
    _in_the_middle(int(step) + 1, _die, times=1, sampling="evaluation")
    _kill_graders(int(step) + 1, rank=0)


def grader_dies(step: str) -> None:
    """All graders of the last rank are killed whenever they start, while this step's responses are graded, until the pool gives up."""
    _kill_graders(int(step), rank=-1)


def megatron_engine_dies_once(step: str) -> None:
    """The in-process engine, on all ranks, in this step's generation."""
    from megatron_antisd.compat import megatron_cpu

    install = megatron_cpu.install

    def install_and_break() -> None:
        install()
        from megatron_antisd.rollout.megatron_engine import MegatronEngine

        draw, calls = MegatronEngine._draw_next, []

        def failing(self: Any, row: Any, sampling: Any) -> Any:
            if self.policy_version == int(step) - 1 and not sampling.ignore_eos:
                calls.append(1)
                if len(calls) == FIFTH:
                    _die()
            return draw(self, row, sampling)

        MegatronEngine._draw_next = failing

    megatron_cpu.install = install_and_break


def _die() -> None:
    raise RuntimeError("the engine core died unexpectedly")


def _hang() -> None:
    time.sleep(600)


def _in_the_middle(step: int, act: Callable[[], None], *, times: int, sampling: str = "training") -> None:
    """Do it in the fifth decoding step of that generation. Training's responses have 16 tokens, the evaluation's 12."""
    from megatron_antisd.rollout.vllm_engine import VllmEngine

    generate, left = VllmEngine._generate, [times]
    length = {"training": 16, "evaluation": 12}[sampling]

    def failing(self: VllmEngine, requests: Any, part: Any, group_size: int, given: Any, *rest: Any) -> Any:
        last = dist.get_rank() == dist.get_world_size() - 1
        due = self.policy_version >= step - 1 and not given.ignore_eos and given.max_new_tokens == length
        if last and due and left[0]:
            left[0] -= 1
            engine = self._replica._llm.llm_engine
            original, calls = engine.step, []

            def failing_step() -> Any:
                calls.append(1)
                if len(calls) == FIFTH:
                    act()
                return original()

            engine.step = failing_step
        return generate(self, requests, part, group_size, given, *rest)

    VllmEngine._generate = failing


def _kill_graders(step: int, rank: int) -> None:
    """Until a pool has given up once."""
    from megatron_antisd.grading.groups import EarlyGrading
    from megatron_antisd.grading.pool import GradingPool

    grade, replace, done = EarlyGrading.__call__, GradingPool._replace, []

    def kill(pool: GradingPool) -> None:
        for worker in pool._workers:
            worker.process.kill()
            worker.process.wait()

    def killing(self: EarlyGrading, finished: Any) -> None:
        here = dist.get_rank() == rank % dist.get_world_size() and kill.engine.policy_version == step - 1
        if here and not done and finished:
            if all(worker.index is None for worker in self._pool._workers):
                kill(self._pool)
                killing.pool = self._pool
        grade(self, finished)

    def replace_and_kill(self: GradingPool, slot: int, lost: str | None) -> int:
        code = replace(self, slot, lost)
        if getattr(killing, "pool", None) is self and not done:
            kill(self)
        return code

    from megatron_antisd.rollout.restarting import RestartingEngine

    initialise, rebuild = RestartingEngine.__init__, GradingPool.rebuild

    def remember(self: Any, *arguments: Any, **options: Any) -> None:
        initialise(self, *arguments, **options)
        kill.engine = self

    def rebuild_in_peace(self: GradingPool, death: Any) -> None:
        done.append(1)
        rebuild(self, death)

    RestartingEngine.__init__, GradingPool.rebuild = remember, rebuild_in_peace
    EarlyGrading.__call__, GradingPool._replace = killing, replace_and_kill


def main() -> None:
    from megatron_antisd.train import main as train

    faults, *arguments = sys.argv[1:]
    for fault in faults.split(","):
        name, _, value = fault.partition("=")
        globals()[name](*([value] if value else []))
    train(arguments)


if __name__ == "__main__":
    main()
