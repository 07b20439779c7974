"""A whole tiny world to train in: a random Qwen3-MoE with a word-level tokenizer and chat template, problems, and a way to start ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from distributed import _environment, _kill_tree
from tiny import VOCAB, make_checkpoint

ANSWERS = ("0", "1", "2", "3")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")  # ids of bos and eos as in tiny.make_checkpoint
WORDS = ("add", "double", "wait", "so", "then", "previous", "assessed", "now", "right", "wrong",
         *(f"\\boxed{{{a}}}" for a in ANSWERS), *ANSWERS)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Where everything lies."""

    root: Path
    checkpoint: Path
    train: Path
    benchmark: Path


def make_world(root: Path, **checkpoint: Any) -> World:
    """`checkpoint` goes to tiny.make_checkpoint."""
    model = make_checkpoint(root / "model", **{"moe": True, **checkpoint})
    write_tokenizer(model)
    rows = [{"id": f"{kind}-{a}-{b}", "problem": f"{kind} {a} {b}", "answer": ANSWERS[(int(a) + int(b)) % 4], "solution": f"so \\boxed{{{a}}}"}
            for kind in ("add", "double") for a in ANSWERS for b in ANSWERS]
    for name, part in (("train", rows[:24]), ("benchmark", rows[24:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return World(root=root, checkpoint=model, train=root / "train.jsonl", benchmark=root / "benchmark.jsonl")


def write_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Words stand for many tokens each, so that a random model finds a boxed answer now and then."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    entries = [*SPECIAL, *WORDS]
    entries += [f"w{i}" for i in range(VOCAB - len(entries))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(entries)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], chat_template=chat_template, clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def configuration(world: World, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration of three quick steps; `sections` are laid over it key by key."""
    raw: dict[str, Any] = {
        "run": {"name": directory.name, "directory": str(directory), "steps": 3},
        "model": {"path": str(world.checkpoint), "dtype": "float32"},
        "data": {"train": [str(world.train)]},
        "parallel": {"timeout_seconds": 60},
        "gate": {"warmup_steps": 1},
        "privileged": {"template": "{problem} previous {solution} assessed {feedback} now", "correct": "right", "incorrect": "wrong"},
        "rollout": {"problems_per_step": 4, "group_size": 4, "max_new_tokens": 16, "max_context": 256, "kv_cache_bytes": 16 << 20,
                    "max_sequences": 16},
        "trainer": {"micro_batch_tokens": 128, "score_micro_batch_tokens": 128, "vocab_chunk_bytes": 16384},
        "optimizer": {"lr": 1e-3},
        "grading": {"workers": 1},
        "logging": {"tensorboard": False, "progress": False},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return raw


def write(raw: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The training rows of a run."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward_mean" in row]


def without_times(directory: Path) -> list[dict[str, Any]]:
    """All rows of a run's metrics.jsonl as they stand, wall clock aside."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("seconds", "tokens_per_second"))} for row in rows]


def launch(ranks: int, *arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node ranks arguments...`; stdout and stderr together in `stdout`, whatever the exit code.

    Raises AssertionError where the ranks are not done in time; they are killed then.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)]
    process = subprocess.Popen(command, env=_environment(None), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        _kill_tree(process)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"not done after {timeout} s:\n{output[-6000:]}") from None
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout=output)


def train(ranks: int, config: Path, *overrides: str, timeout: float = 240) -> str:
    """Train; the output. Raises AssertionError where it fails."""
    done = launch(ranks, "-m", "megatron_antisd.train", config, *overrides, timeout=timeout)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
