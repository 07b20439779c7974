"""Small models to convert, with the files that stand beside weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint, make_olmo3

SMALL_BUCKET = 1 << 16  # several parts even here
BESIDE = {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "x"}', "chat_template.jinja": "{{ messages }}\n",
          "generation_config.json": '{"eos_token_id": [2, 5]}', "LICENSE": "free\n"}
NOT_COPIED = ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".gitattributes")


def make(kind: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """`kind`: dense, tied, moe or olmo3."""
    if kind == "olmo3":
        make_olmo3(directory, dtype=dtype, **changes)
    else:
        make_checkpoint(directory, moe=kind == "moe", tied=kind == "tied", dtype=dtype, **changes)
    for name, text in BESIDE.items():
        (directory / name).write_text(text)
    for name in NOT_COPIED:
        (directory / name).write_text("{}")
    (directory / "figures").mkdir()
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def shard(directory: Path, count: int) -> Path:
    """Rewrite a single safetensors file as `count` with an index."""
    found = tensors(directory)
    (directory / "model.safetensors").unlink()
    names, weight_map = list(found), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        mine = names[len(names) * number // count : len(names) * (number + 1) // count]
        save_file({name: found[name] for name in mine}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def change(directory: Path, **tensors_or_none: torch.Tensor | None) -> Path:
    """Replace, add or (None) remove tensors of model.safetensors; "__" in a name stands for a dot."""
    found = tensors(directory)
    for name, tensor in tensors_or_none.items():
        name = name.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def assert_same(one: Path, other: Path) -> None:
    """Names, dtypes and bits of all tensors, and the files beside them."""
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    for name in ("config.json", *BESIDE):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
