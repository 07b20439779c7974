"""One long life: the quickstart's run for 500 steps, with faults again and again. `python -m benchmarks.soak [--quick]`

Two ranks (TP2, EP2, vLLM), a checkpoint every 10 steps in the background, an evaluation every 25. Injected (benchmarks/soak_faults.py), at steps
that a seed draws: engines that raise or hang, graders killed from outside, grading pools that die, checkpoints that find the disk full, gradients
that are NaN, and spikes that the run rolls back from. Every 2 s the launcher, each rank and each grader are looked at: memory, threads, open files,
connections, and what they have in /dev/shm and the temporary directory.

Goals: every fault is survived; each role's mean resident memory in the last tenth of the steps is within 2 % of that between 20 and 30 %; nothing is
left behind at the end. Ends with code 1 where one is missed. Draws `soak.png`. The learning rate is so small that every step is like the others; more
`key=value` change the configuration, so `optimizer.lr=2e-4` soaks the quickstart as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.launch import ROOT, machine
from benchmarks.soak_faults import KINDS, SPIKE_FACTOR, WORKER_KILLED, Fault, make_plan, read_sizes

CONFIG = ROOT / "examples/quickstart/config.yaml"
INPUTS = ROOT / "runs/quickstart-inputs"
RANKS, CHECKPOINT_EVERY, EVALUATE_EVERY, KEEP = 2, 10, 25, 2
COUNTS = {"engine_raises": 8, "engine_hangs": 4, "worker_killed": 20, "pool_dies": 6, "checkpoint_fails": 6, "nan_gradient": 6, "gradient_spike": 2}
QUICK_COUNTS = {**dict.fromkeys(KINDS, 1), "engine_raises": 2, "worker_killed": 2}
SAMPLING_SECONDS = 2.0
LEARNING_RATE = 1e-6
"""So small that the policy stays what it is: one that learns writes longer responses, which take more memory."""
TORCHS_OWN = ("torchelastic_", "torchinductor_")
"""What torchrun (an empty folder a launch) and torch's compiler (its cache) leave in the temporary directory of every program."""
MARK = "ANTISD_SOAK"
"""In the environment of every process of the run, whoever its parent is by then."""


@dataclass(kw_only=True)
class Watch:
    """What was seen of a run from outside."""

    mark: str
    metrics: Path
    kills: list[Fault]
    samples: list[dict[str, Any]] = field(default_factory=list)
    killed: list[tuple[int, str, int]] = field(default_factory=list)
    """(step, role, pid)."""
    processes: dict[int, float] = field(default_factory=dict)
    """pid -> time it was made."""
    shared_memory: set[str] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)

    def look(self, launcher: psutil.Process) -> None:
        """One sample of every process, and a grader killed where one is due."""
        step, roles = last_step(self.metrics), roles_of(launcher)
        for role, process in roles:
            try:
                self.samples.append({"time": time.time(), "step": step, "role": role, **self._figures(process)})
            except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
                continue  # it ended meanwhile
        while self.kills and step + 1 >= self.kills[0].step:
            graders = [process for role, process in roles if role == f"rank {self.kills[0].rank} grader"]
            if not graders:
                break  # it is being replaced: the next look has one
            graders[0].kill()
            self.killed.append((step + 1, f"rank {self.kills[0].rank} grader", graders[0].pid))
            self.kills.pop(0)

    def _figures(self, process: psutil.Process) -> dict[str, int]:
        pid = process.pid
        self.processes[pid] = process.create_time()
        sizes = read_sizes(pid)
        connections = process.net_connections(kind="inet")
        listening = [connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN]
        self.ports |= set(listening)
        self.shared_memory |= shared_memory_of(pid)
        return {"pid": pid, **sizes, "threads": process.num_threads(), "files": process.num_fds(), "connections": len(connections),
                "listening": len(listening)}


def roles_of(launcher: psutil.Process) -> list[tuple[str, psutil.Process]]:
    """Every process of the run with its role; what is neither the launcher, a rank nor a grader is named after its command."""
    found = [("launcher", launcher)]
    for number, rank in enumerate(sorted(_children(launcher), key=_rank_of)):
        found.append((f"rank {number}", rank))
        for child in _children(rank, recursive=True):
            found.append((f"rank {number} {_part(child)}", child))
    return found


def _part(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "ending process"
    for name, mark in (("grader", "grading.worker"), ("resource tracker", "resource_tracker")):
        if any(mark in part for part in command):
            return name
    return " ".join(command)[:60] or "ending process"


def _rank_of(process: psutil.Process) -> int:
    try:
        return int(process.environ().get("RANK", 1 << 20))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 1 << 20


def _children(process: psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    try:
        return process.children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def shared_memory_of(pid: int) -> set[str]:
    """Names in /dev/shm that a process has mapped or open."""
    found = {line.split()[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "/dev/shm/" in line and len(line.split()) == 6}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue  # closed meanwhile
        if target.startswith("/dev/shm/"):
            found.add(target)
    return found


def last_step(metrics: Path) -> int:
    """The step of the last whole row; 0 where there is none."""
    if not metrics.is_file():
        return 0
    rows = [line for line in metrics.read_bytes()[-16384:].split(b"\n") if line.startswith(b"{") and line.endswith(b"}")]
    return int(json.loads(rows[-1])["step"]) if rows else 0


# -- the run ---------------------------------------------------------------------------------------------------------------


def overrides(directory: Path, steps: int) -> list[str]:
    """What the soak changes of the quickstart's configuration."""
    return [
        f"run.directory={directory}", f"run.steps={steps}", f"run.name={directory.name}", f"checkpoint.every={CHECKPOINT_EVERY}",
        f"checkpoint.keep={KEEP}", "checkpoint.on_failure=continue", "checkpoint.resume=false", f"evaluation.every={EVALUATE_EVERY}",
        "rollout.stall_seconds=10", "rollout.max_restarts=1000", "grading.max_rebuilds=1000", "health.gradient_spike.action=rollback",
        f"health.gradient_spike.factor={SPIKE_FACTOR:g}", "health.max_rollbacks=100", "logging.progress=false", f"optimizer.lr={LEARNING_RATE:g}"]


def live(directory: Path, plan: Sequence[Fault], steps: int, extra: Sequence[str]) -> tuple[Watch, int]:
    """The run from its first process to its last; what was seen of it and its exit code. Its output goes to `output.txt`."""
    temporary = directory / "temporary"
    temporary.mkdir()
    (directory / "plan.json").write_text(json.dumps([dataclasses.asdict(fault) for fault in plan]))
    watch = Watch(mark=uuid.uuid4().hex, metrics=directory / "run/metrics.jsonl", kills=[fault for fault in plan if fault.kind == WORKER_KILLED])
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, MARK: watch.mark, "TMPDIR": str(temporary),
                   "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "benchmarks.soak_faults",
               str(directory / "plan.json"), str(CONFIG), *overrides(directory / "run", steps), *extra]
    (directory / "command.txt").write_text(" ".join(command) + "\n")
    with (directory / "output.txt").open("w") as output, (directory / "samples.jsonl").open("w") as samples:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        launcher = psutil.Process(process.pid)
        while process.poll() is None:
            before = len(watch.samples)
            watch.look(launcher)
            samples.writelines(json.dumps(sample) + "\n" for sample in watch.samples[before:])
            samples.flush()
            time.sleep(SAMPLING_SECONDS)
    return watch, process.returncode


def left_behind(watch: Watch, temporary: Path) -> dict[str, list[str]]:
    """What outlived the run: processes of it, ports they listen on, names in /dev/shm, entries of the temporary directory."""
    time.sleep(2.0)
    processes = [process for process in psutil.process_iter() if _is_of_run(process, watch)]
    pids = {str(pid) for pid in watch.processes}
    named = [str(path) for path in Path("/dev/shm").iterdir() if pids & set(path.name.replace("-", "_").replace(".", "_").split("_"))]
    ports = [connection.laddr.port for process in processes for connection in process.net_connections("inet") if connection.status == "LISTEN"]
    return {
        "processes": [f"{process.pid}: {' '.join(process.cmdline())[:100]}" for process in processes],
        "listening ports": list(map(str, ports)),
        "in /dev/shm": sorted({name for name in watch.shared_memory if Path(name).exists()} | set(named)),
        "in TMPDIR": sorted(path.name for path in temporary.iterdir() if not path.name.startswith(TORCHS_OWN)),
    }


def _is_of_run(process: psutil.Process, watch: Watch) -> bool:
    try:
        known = watch.processes.get(process.pid) == process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and (known or process.environ().get(MARK) == watch.mark)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def prepare(output: Path) -> None:
    """The quickstart's inputs, and an empty directory for the run."""
    subprocess.run([sys.executable, "-m", "examples.quickstart.prepare", str(INPUTS)], cwd=ROOT, check=True)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="500, with --quick 60")
    parser.add_argument("--quick", action="store_true", help="few steps, one or two faults of a kind")
    parser.add_argument("--faults", default=None, help="other numbers of them, e.g. engine_raises=30,pool_dies=0")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' steps and ranks")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/benchmarks/soak")
    parser.add_argument("--plot", type=Path, help="default: soak.png in the output directory")
    given, extra = parser.parse_known_args(arguments)
    from benchmarks import soak_report

    steps = given.steps or (60 if given.quick else 500)
    counts = {**(QUICK_COUNTS if given.quick else COUNTS), **_counts(given.faults)}
    plan = make_plan(counts, steps=steps, checkpoint_every=CHECKPOINT_EVERY, ranks=RANKS, seed=given.seed)
    output = given.output.absolute()
    prepare(output)
    print(f"{machine()}; {steps} steps, faults: {', '.join(f'{count} {kind}' for kind, count in counts.items())}", flush=True)
    started = time.monotonic()
    watch, code = live(output, plan, steps, extra)
    print(f"ended with code {code} after {(time.monotonic() - started) / 60:.1f} min; {output / 'output.txt'}", flush=True)
    left = left_behind(watch, output / "temporary")
    (output / "end.json").write_text(json.dumps({"killed": watch.killed, "left": left, "code": code}))
    return soak_report.report(output, watch.samples, watch.killed, left, code=code, steps=steps, plot=given.plot or output / "soak.png")


def _counts(text: str | None) -> dict[str, int]:
    pairs = [part.partition("=") for part in (text or "").split(",") if part]
    unknown = [name for name, _, value in pairs if name not in KINDS or not value.isdigit()]
    if unknown:
        raise SystemExit(f"--faults: got {unknown}, expected KIND=NUMBER, the kinds are {', '.join(KINDS)}")
    return {name: int(value) for name, _, value in pairs}


if __name__ == "__main__":
    sys.exit(main())
