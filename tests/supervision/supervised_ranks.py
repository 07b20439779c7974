"""A little run under a Supervisor in which one rank misbehaves: `supervised_ranks.py DIRECTORY FAULT RANK`. Each rank prints its process id.

Step 1 is sound. In stage `generate` of step 2 the rank does what FAULT says while the others wait for it in a collective.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_antisd.config.reliability import SupervisionConfig
from megatron_antisd.supervision import Supervisor, collectives

CONFIG = SupervisionConfig(generate_seconds=5, other_seconds=20, heartbeat_seconds=0.5, silence_seconds=3)


def sleep() -> None:
    time.sleep(600)


def stop() -> None:
    time.sleep(1)  # some heartbeats, so that its place is known
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGKILL)


def spin() -> None:
    while True:
        pass


def hold_interpreter() -> None:
    time.sleep(1)  # some heartbeats, so that its place is known
    ctypes.PyDLL(None).sleep(600)


def fail() -> None:
    raise ValueError("the dog ate the batch")


def leave() -> None:
    sys.exit("nothing to do")


def jump() -> None:
    """The wall clock goes a week ahead and back; nobody may mind."""
    now = time.time
    time.time = lambda: now() + 7 * 86400
    time.sleep(2)
    time.time = lambda: now() - 7 * 86400
    time.sleep(2)


FAULTS = {function.__name__: function for function in (sleep, stop, die, spin, hold_interpreter, fail, leave, jump)}


def say(line: str) -> None:
    """In one write: the lines of several ranks go into one file."""
    os.write(1, f"{line}\n".encode())


def main(directory: Path, fault: str, culprit: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    dist.init_process_group("gloo")
    collectives.install()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    say(f"pid of rank {rank}: {os.getpid()}")
    store = dist.distributed_c10d._get_default_store()
    with Supervisor(CONFIG, directory=directory, store=store, rank=rank, world_size=world_size) as supervisor:
        for step in (1, 2):
            with supervisor.stage("generate", step):
                dist.barrier()
                if step == 2 and rank == culprit:
                    FAULTS[fault]()
                dist.all_reduce(torch.ones(1))
    say(f"rank {rank} is done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
