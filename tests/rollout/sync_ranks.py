"""Two trainer ranks (TP2, sequence parallel, EP2) and two engine processes that get their weights: `sync_ranks.py FOLDER TRANSPORT`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_models import VOCAB, log_probs, make_model, save

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import build_config
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.parallel.weight_sender import ReceiverSpec, WeightSender
from megatron_antisd.wire.exchange import run as run_parts

PROMPT = torch.randint(3, VOCAB, (140,), generator=torch.Generator().manual_seed(0)).tolist()
SERVERS = (ReceiverSpec(name="one", tensor_parallel_size=1), ReceiverSpec(name="two", tensor_parallel_size=2))


class Servers:
    """On rank 0: the engine processes, by name."""

    def __init__(self, store: dist.Store, port: int, model: Path) -> None:
        self._store, self._count = store, {server.name: 0 for server in SERVERS}
        self._processes = [subprocess.Popen([sys.executable, str(Path(__file__).with_name("sync_server.py")), str(port), server.name, str(model),
                                             str(server.tensor_parallel_size)]) for server in SERVERS]

    def tell(self, name: str, **command: Any) -> None:
        self._store.set(f"{name}/command/{self._count[name]}", json.dumps(command))

    def answer(self, name: str) -> dict[str, Any]:
        key = f"{name}/answer/{self._count[name]}"
        self._count[name] += 1
        end = time.monotonic() + 200
        while time.monotonic() < end:
            if self._store.check([key]):
                return json.loads(self._store.get(key))
            dead = [process.args for process in self._processes if process.poll() not in (None, 0)]
            if dead:
                raise RuntimeError(f"engine processes died: {dead}")
            time.sleep(0.02)
        raise RuntimeError(f"no answer from {name}")

    def ask(self, name: str, **command: Any) -> dict[str, Any]:
        self.tell(name, **command)
        return self.answer(name)

    def end(self) -> None:
        for name in self._count:
            self.tell(name, do="end")
        for process in self._processes:
            process.wait(30)


class Syncs:
    """Both sides of a sync, driven from rank 0."""

    def __init__(self, sender: WeightSender, store: dist.Store, port: int, servers: Servers | None) -> None:
        self._sender, self._store, self._address, self.servers, self._number = sender, store, f"127.0.0.1:{port}", servers, 0

    def run(self, version: int, *, absent: Sequence[str] = (), silent: bool = False) -> dict[str, Any]:
        """`absent`: servers that are not told. `silent`: the trainer does not come."""
        self._number += 1
        sync = self._sender.prepare(SERVERS, sync_id=str(self._number), version=version, store=self._store, address=self._address,
                                    checksum_tensors=12)
        told = [server.name for server in SERVERS if server.name not in absent]
        if self.servers is not None:
            for name in told:
                self.servers.tell(name, do="call", method="receive_weights", arguments=[sync.specs[name]])
        begin = time.perf_counter()
        failures = {} if silent else sync.send()
        answers = [None]
        if self.servers is not None:
            answers = [{name: self.servers.answer(name) for name in told}]
        seconds = time.perf_counter() - begin
        dist.broadcast_object_list(answers, src=0)
        reports = {name: answer["answer"] for name, answer in answers[0].items()}
        return {"failures": failures, "errors": {name: [row["error"] for row in rows] for name, rows in reports.items()},
                "mismatches": sync.mismatches({name: rows for name, rows in reports.items() if not any(row["error"] for row in rows)}),
                "seconds": seconds, "checked": sorted({n for rows in reports.values() for n in rows[0]["checksums"]})}

    def difference(self, name: str, model: Any) -> float | str | None:
        """Mean |engine - transformers| log-prob of 8 sampled tokens."""
        if self.servers is None:
            return None
        answer = self.servers.ask(name, do="generate", prompt=PROMPT, seed=1)
        if "error" in answer:
            return answer["error"]
        ids, theirs = answer["answer"]
        return float((log_probs(model, PROMPT, ids) - torch.tensor(theirs)).abs().mean())


def cases(syncs: Syncs, sender: WeightSender, models: Sequence[Any], load: Any, timeout: float) -> dict[str, Any]:
    facts: dict[str, Any] = {"first": syncs.run(1), "first_differences": [syncs.difference(s.name, models[0]) for s in SERVERS]}
    load(1)
    facts["second"] = syncs.run(2)
    facts["second_differences"] = [syncs.difference(s.name, models[1]) for s in SERVERS]
    sender._timeout = timeout
    load(0)
    facts["nobody_sends"] = syncs.run(3, silent=True)
    facts["old_weights_whole"] = [syncs.difference(s.name, models[1]) for s in SERVERS]
    facts["one_is_absent"] = syncs.run(3, absent=["two"])
    facts["the_other_has_it"] = syncs.difference("one", models[0])
    return facts


def stall(syncs: Syncs, models: Sequence[Any], load: Any, timeout: float) -> dict[str, Any]:
    """The last trainer rank falls silent in the middle of a transfer to `one`."""
    from megatron_antisd.parallel import weight_sender

    def stopping(script: Any, transport: Any) -> Any:
        if transport._meeting.members[-1] == "engine rank 0 of one" and dist.get_rank() == 1:
            exchange, count = transport.exchange, iter(range(1000))

            def later(sends: Any, receives: Any) -> Any:
                if next(count) == 4:
                    time.sleep(timeout + 2)
                return exchange(sends, receives)

            transport.exchange = later
        return run_parts(script, transport)

    load(1)
    weight_sender.run = stopping
    facts: dict[str, Any] = {"stalled": syncs.run(4)}
    weight_sender.run = run_parts
    if syncs.servers is not None:
        facts["state"] = syncs.servers.ask("one", do="call", method="weights_state", arguments=[])
    facts["the_other_has_it"] = syncs.difference("two", models[1])
    facts["again"] = syncs.run(4)
    facts["again_differences"] = [syncs.difference(s.name, models[1]) for s in SERVERS]
    return facts


def main(folder: Path, transport: str) -> None:
    models = [make_model("moe", seed) for seed in (0, 1)]
    start_process_group(240)
    rank = dist.get_rank()
    paths = [folder / f"model{seed}" for seed in (0, 1)]
    if rank == 0:
        for model, path in zip(models, paths, strict=True):
            save(model, path)
    dist.barrier()
    config = build_config({"model": {"path": str(paths[0]), "dtype": "float32"}, "data": {"train": ["none"]},
                           "parallel": {"tensor_parallel_size": 2, "expert_parallel_size": 2}})
    megatron_cpu.install()
    from megatron_antisd.models.build import build_model, describe
    from megatron_antisd.parallel.reshard import load_huggingface

    layout = build_layout(config.parallel, seed=0)
    description = describe(paths[0], layout.tensor_size)
    chunks = build_model(description, config.model, config.parallel)

    def load(number: int) -> None:
        load_huggingface(chunks, description, layout, paths[number])

    load(0)
    port = [0]
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))
        port = [store.port]
    dist.broadcast_object_list(port, src=0)
    if rank:
        store = dist.TCPStore("127.0.0.1", port[0], is_master=False, timeout=timedelta(seconds=300))
    sender = WeightSender(chunks, description, layout, bucket_bytes=256 << 10, transport=transport, timeout=60)
    servers = Servers(store, port[0], paths[0]) if rank == 0 else None
    syncs = Syncs(sender, store, port[0], servers)
    if servers is not None:
        for server in SERVERS:
            servers.ask(server.name, do="call", method="weights_state", arguments=[])  # they have started
    dist.barrier()
    facts = cases(syncs, sender, models, load, 8.0)
    facts["stall"] = stall(syncs, models, load, 8.0)
    facts["parts"] = {str(key): len(planned.plan.parts) for key, planned in sender._plans.items()}
    if servers is not None:
        servers.end()
    (folder / f"facts_{rank}.json").write_text(json.dumps(facts, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
