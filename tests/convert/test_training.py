"""Training from a converted checkpoint is training from the Hugging Face model it was made of, vLLM included; its checkpoints convert back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.models import tensors
from tiny_world import configuration, make_world, train, write

from megatron_antisd.config import ParallelConfig
from megatron_antisd.convert.to_huggingface import convert_to_huggingface
from megatron_antisd.convert.to_megatron import convert_to_megatron

pytest.importorskip("vllm", reason="vLLM is not installed")
TIMES = ("seconds", "tokens_per_second")


def figures(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


@pytest.mark.slow
def test_the_run_is_the_same(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    convert_to_megatron(world.checkpoint, tmp_path / "megatron", ParallelConfig(tensor_parallel_size=2), verify=True)
    for name, model in (("before", world.checkpoint), ("after", tmp_path / "megatron")):
        raw = configuration(world, tmp_path / name, run={"name": "tiny", "steps": 2}, model={"path": str(model)}, checkpoint={"every": 2},
                            parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2})
        train(2, write(raw, tmp_path / f"{name}.yaml"))
    rows = figures(tmp_path / "after")
    assert len(rows) == 2 and rows == figures(tmp_path / "before")
    convert_to_huggingface(tmp_path / "after", tmp_path / "converted", verify=True)
    converted, exported, start = tensors(tmp_path / "converted"), tensors(tmp_path / "after" / "hf"), tensors(world.checkpoint)
    assert converted.keys() == exported.keys() == start.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in converted.items())
    assert not torch.equal(converted["model.norm.weight"], start["model.norm.weight"])
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "after" / "hf" / name).read_bytes()
