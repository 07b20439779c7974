"""Megatron's CPU support leaves torch's factories as they are to everyone else in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tiny import make_checkpoint

# In a process of its own: what is replaced stays, and the first use of a device context decides how all later ones work.
SCRIPT = """
import sys
import torch
from megatron_antisd.compat import megatron_cpu
from transformers import AutoModelForCausalLM

megatron_cpu.install()
with torch.device("meta"):
    for name in ("tensor", "zeros", "ones", "empty", "arange", "as_tensor"):
        made = getattr(torch, name)([2] if "tensor" in name else 2)
        assert made.device.type == "meta", (name, made.device)
    assert torch.full((2,), 1).device.type == "meta"
assert torch.zeros(2).device.type == "cpu" and torch.zeros(2, device="cuda").device.type == "cpu"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
torch.save(model.model.rotary_emb.inv_freq, sys.argv[2])
"""


def test_device_contexts_hold_and_transformers_loads_a_whole_model(tmp_path: Path) -> None:
    """transformers asks `torch.tensor([])` on which device it is building. After a wrong answer it leaves the rotary frequencies to whatever the
    memory holds, without a word."""
    folder = make_checkpoint(tmp_path / "model", moe=False, num_hidden_layers=1)
    done = subprocess.run([sys.executable, "-c", SCRIPT, folder, tmp_path / "found.pt"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), 1e4 ** -(torch.arange(0, 32, 2) / 32))
