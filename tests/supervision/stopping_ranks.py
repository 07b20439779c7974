"""A loop that can be asked to stop: `stopping_ranks.py DIRECTORY`. Each rank prints its process id, and the step at which all agreed."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_antisd.config.reliability import SupervisionConfig
from megatron_antisd.supervision import Supervisor, preemption


def say(line: str) -> None:
    """In one write: the lines of several ranks go into one file."""
    os.write(1, f"{line}\n".encode())


def main(directory: Path) -> None:
    preemption.install()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0:
        preemption.clear_preempted(directory)
    with (directory / f"starts_{rank}").open("a") as file:
        file.write("start\n")
    dist.barrier()
    say(f"pid of rank {rank}: {os.getpid()}")
    config = SupervisionConfig(heartbeat_seconds=0.5, silence_seconds=10)
    store = dist.distributed_c10d._get_default_store()
    with Supervisor(config, directory=directory, store=store, rank=rank, world_size=dist.get_world_size()) as supervisor:
        for step in range(1, 1000):
            with supervisor.stage("step", step):
                time.sleep(0.05 * (rank + 1))
            if preemption.agreed(None):
                say(f"rank {rank} stops after step {step}, itself asked: {preemption.requested()}")
                preemption.leave_preempted(directory, step, directory / "checkpoint")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
