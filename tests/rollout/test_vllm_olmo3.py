"""vLLM runs OLMo-3 through its transformers backend: log-probs before and after a weight sync, beyond the window and over two cache blocks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_olmo3

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")
AGREES = 1e-4  # nats, any token; measured 4e-6


@pytest.mark.slow
def test_log_probs_are_transformers_own_before_and_after_an_update(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoints = [make_olmo3(tmp_path / str(seed), hidden_size=128, seed=seed) for seed in (0, 1)]  # vLLM's CPU attention wants heads of 32
    command = [sys.executable, str(Path(__file__).with_name("vllm_olmo3.py")), *map(str, checkpoints), str(tmp_path / "sampled.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    sampled = json.loads((tmp_path / "sampled.json").read_text())
    assert len(sampled) == 2
    for own, other, generations in zip(checkpoints, checkpoints[::-1], sampled, strict=True):
        models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (own, other)]
        for prompt, response, log_probs in generations:
            with torch.no_grad():
                tables = [model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models]
            mine, others = (table.gather(1, torch.tensor(response)[:, None])[:, 0] - torch.tensor(log_probs) for table in tables)
            assert mine.abs().max() < AGREES
            assert others.abs().mean() > 0.5, "the two checkpoints must be told apart"
