"""Hugging Face -> Megatron on one layout -> disk -> Megatron on another -> disk -> Hugging Face, bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import make_checkpoint, make_olmo3

from megatron_antisd.convert.to_huggingface import convert_to_huggingface

SCRIPT = Path(__file__).with_name("save_ranks.py")
TP, PP, VPP, EP, ETP, CP = ("tensor_parallel_size=2", "pipeline_parallel_size=2", "virtual_pipeline_size=2", "expert_parallel_size=2",
                            "expert_tensor_parallel_size=2", "context_parallel_size=2")
CASES = {
    "moe, tp2 x pp2 then ep2": ("moe", torch.float32, (4, TP, PP), (2, EP)),
    "moe in bf16, tp2 x ep2 then pp2 x vpp2": ("moe", torch.bfloat16, (2, TP, EP), (2, PP, VPP)),
    "moe, etp2 other than tp, then cp2 x ep2": ("moe", torch.float32, (2, ETP), (2, CP, EP)),
    "moe in bf16, uneven stages then tp2 x etp2": ("moe", torch.bfloat16, (2, PP, "pipeline_layers=[3,1]"), (2, TP, ETP)),
    "dense and tied, pp2 then tp2": ("tied", torch.bfloat16, (2, PP), (2, TP)),
    "dense and tied, tp2 then pp2 x vpp2": ("tied", torch.float32, (2, TP), (2, PP, VPP)),
    "olmo3, tp2 then pp2 x vpp2": ("olmo3", torch.float32, (2, TP), (2, PP, VPP)),
    "olmo3 in bf16, tp2 x pp2 then cp2": ("olmo3", torch.bfloat16, (4, TP, PP), (2, CP)),
}
SLOW = set(list(CASES)[2:4]) | {"dense and tied, tp2 then pp2 x vpp2", "olmo3, tp2 then pp2 x vpp2"}


def make(kind: str, directory: Path, dtype: torch.dtype) -> Path:
    if kind == "olmo3":
        return make_olmo3(directory, dtype=dtype)
    return make_checkpoint(directory, moe=kind == "moe", tied=kind == "tied", dtype=dtype)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_nothing_changes_on_the_way(tmp_path: Path, name: str) -> None:
    kind, dtype, *layouts = CASES[name]
    model = source = make(kind, tmp_path / "hf", dtype)
    for number, (ranks, *overrides) in enumerate(layouts):
        run_ranks(SCRIPT, ranks, str(model), str(tmp_path / f"saved{number}"), str(dtype).removeprefix("torch."), *overrides)
        model = tmp_path / f"saved{number}" / "step_000000"
    convert_to_huggingface(model, tmp_path / "back")
    before = load_file(source / "model.safetensors")
    after = {name: tensor for file in (tmp_path / "back").glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype == dtype and torch.equal(after[key], tensor), key
