"""`hf/` is whole or absent wherever the process that writes it dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_checkpoint

from megatron_antisd.parallel.reshard import save_huggingface

WRITE = """
import os, signal, sys
from pathlib import Path
import torch
from megatron_antisd.parallel import reshard
name, source, directory = sys.argv[1:]
function = getattr(Path, name) if hasattr(Path, name) else getattr(reshard, name)
def die_after(*arguments, **options):
    function(*arguments, **options)
    if name != "rename" or str(directory) in map(str, arguments[:1]):
        os.kill(os.getpid(), signal.SIGKILL)
setattr(Path if hasattr(Path, name) else reshard, name, die_after)
reshard.save_huggingface(iter([("weight", torch.full((4,), 2.0))]), source, Path(directory), write=True)
"""


def weight(directory: Path) -> float:
    (file,) = directory.glob("*.safetensors")
    return load_file(file)["weight"][0].item()


@pytest.mark.parametrize(("name", "left"), [pytest.param("copy_model_files", 1.0, marks=pytest.mark.slow), ("rename", None)])
def test_killed_over_an_earlier_export(tmp_path: Path, name: str, left: float | None) -> None:
    """`rename`: the earlier export has made room, the new one does not bear its name yet."""
    source, directory = make_checkpoint(tmp_path / "source", moe=False), tmp_path / "hf"
    save_huggingface(iter([("weight", torch.ones(4))]), source, directory, write=True)
    killed = subprocess.run([sys.executable, "-c", WRITE, name, str(source), str(directory)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (weight(directory) if directory.exists() else None) == left
    save_huggingface(iter([("weight", torch.full((4,), 3.0))]), source, directory, write=True)
    assert weight(directory) == 3.0 and (directory / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "source"]
