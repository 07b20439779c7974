"""What does converting a checkpoint cost over copying it?

    python -m benchmarks.conversion [--gigabytes 2.5] [--rounds 3]

Makes a bf16 Qwen3-MoE checkpoint of random weights, then by turns, each as a fresh process on the same disk: copies it and takes the copy's
SHA-256, converts it to a checkpoint of this project and back; once, loads and saves it with transformers. Start-up is part of every time. Memory
is the highest anonymous resident memory above what the same program has after its imports: pages of files, which the system may drop, do
not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.launch import ROOT, machine

TIME_RATIO, MEMORY_RATIO = 1.5, 1.5
BUCKET_BYTES = 512 << 20
SHARD_BYTES = 1 << 30
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 768, "max_position_embeddings": 40960, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}
COPY, LOAD_AND_SAVE = "copy", "transformers"


@dataclass(frozen=True, kw_only=True)
class Cost:
    seconds: float
    anonymous: int
    """Highest anonymous resident memory, bytes."""


def make_checkpoint(directory: Path, nbytes: float) -> tuple[int, int]:
    """Random weights of at least `nbytes`, written shard by shard; bytes of all tensors and of the largest."""
    import torch
    from safetensors.torch import save_file

    from megatron_antisd.models.description import describe
    from megatron_antisd.models.huggingface import shard_name, write_index

    directory.mkdir(parents=True)
    layers = 1
    while True:
        (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        shapes = describe(directory, 1).huggingface_shapes()
        sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
        if sum(sizes.values()) >= nbytes:
            break
        layers += 1
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[each] for each in shards[-1]) + sizes[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = {shard_name(number, len(shards)): names for number, names in enumerate(shards, start=1)}
    for file, names in files.items():
        save_file({name: torch.randint(-(1 << 14), 1 << 14, shapes[name], dtype=torch.int16).view(torch.bfloat16) for name in names},
                  directory / file, metadata={"format": "pt"})
    write_index(directory, files, sum(sizes.values()))
    return sum(sizes.values()), max(sizes.values())


def copy(source: Path, target: Path) -> None:
    """Every file to disk for good, then its checksum."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())
            hashlib.file_digest(written, "sha256")


def load_and_save(source: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)


def measure(*command: str) -> Cost:
    """Run a Python command to its end. Raises RuntimeError with its output when it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    start, highest = time.monotonic(), 0
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as process:
        while process.poll() is None:
            highest = max(highest, anonymous_memory(process.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - start
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}:\n{process.stdout.read()[-4000:]}")
    return Cost(seconds=seconds, anonymous=highest)


def anonymous_memory(process: int | str) -> int:
    """Bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def one_round(source: Path, directory: Path, this: str) -> Iterator[tuple[str, Cost]]:
    """The three that are compared, each from scratch."""
    for name in ("copy", "megatron", "huggingface"):
        shutil.rmtree(directory / name, ignore_errors=True)
    yield "copy + SHA-256", measure("-m", this, "--child", COPY, str(source), str(directory / "copy"))
    yield "Hugging Face -> Megatron", measure("tools/convert_hf_to_megatron.py", "--hf-model", str(source), "--output", str(directory / "megatron"))
    yield "Megatron -> Hugging Face", measure("tools/convert_megatron_to_hf.py", "--checkpoint", str(directory / "megatron"),
                                              "--output", str(directory / "huggingface"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/conversion"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is not None:
        work, source, target = given.child
        (copy if work == COPY else load_and_save)(Path(source), Path(target))
        return 0
    directory, this = given.output.absolute(), "benchmarks.conversion"
    shutil.rmtree(directory, ignore_errors=True)
    try:
        nbytes, largest = make_checkpoint(directory / "source", given.gigabytes * 1e9)
        os.sync()
        start = measure("-c", "import time; import megatron_antisd.convert.commands; time.sleep(0.2)")
        costs: dict[str, list[Cost]] = {}
        for _ in range(given.rounds):
            for name, cost in one_round(directory / "source", directory, this):
                costs.setdefault(name, []).append(cost)
        for name in ("copy", "megatron", "huggingface"):
            shutil.rmtree(directory / name)
        costs["transformers load + save"] = [measure("-m", this, "--child", LOAD_AND_SAVE, str(directory / "source"), str(directory / "saved"))]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return report_costs(costs, start, nbytes, max(BUCKET_BYTES, largest))


def report_costs(costs: dict[str, list[Cost]], start: Cost, nbytes: int, bucket: int) -> int:
    """The table; 1 when a goal is missed."""
    copied = statistics.median(cost.seconds for cost in costs["copy + SHA-256"])
    print(f"{nbytes / 1e9:.2f} GB, largest bucket {bucket / 1e6:.0f} MB, {machine()}; start-up of a conversion {start.seconds - 0.2:.1f} s\n")
    print("| work | seconds | to copying | extra anonymous memory, MB | to the largest bucket |\n|---|---:|---:|---:|---:|")
    missed = False
    for name, found in costs.items():
        seconds = statistics.median(cost.seconds for cost in found)
        extra = max(cost.anonymous for cost in found) - (start.anonymous if "->" in name else 0)
        print(f"| {name} | {seconds:.1f} | {seconds / copied:.2f} | {extra / 1e6:.0f} | {extra / bucket:.2f} |")
        missed |= "->" in name and (seconds > TIME_RATIO * copied or extra > MEMORY_RATIO * bucket)
    print(f"\ngoal: both directions at most {TIME_RATIO} times copying, below {MEMORY_RATIO} buckets: {'missed' if missed else 'kept'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
