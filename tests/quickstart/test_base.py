"""The quickstart's base model, made by its own recipe: a poor guesser, so that there is something to learn, and not a hopeless one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # about 3 minutes on 2 cores
@pytest.mark.timeout(1200)
def test_base_model_solves_a_tenth_to_a_quarter_of_held_out_problems(tmp_path: Path) -> None:
    """A random candidate out of seven would be right in 14 %. 512 samples at 15 % have a standard error of 1.6 points."""
    inputs = tmp_path / "inputs"
    done = subprocess.run([sys.executable, "-m", "examples.quickstart.prepare", str(inputs)], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:]
    evaluated = launch(
        2, "-m", "megatron_antisd.evaluate", ROOT / "examples/quickstart/config.yaml", f"model.path={inputs}/base",
        f"data.train=[{inputs}/train.jsonl]", f"run.directory={tmp_path}/run", "rollout.engine=megatron",
        f"evaluation.benchmarks=[{{name: search, path: {inputs}/search.jsonl, samples: 2}}]")
    assert evaluated.returncode == 0, evaluated.stdout[-6000:]
    (row,) = map(json.loads, (tmp_path / "run/evaluation/metrics.jsonl").read_text().splitlines())
    assert 0.10 <= row["eval/search/avg@2"] <= 0.25
    assert row["eval/search/truncation_rate"] < 0.2, "responses end by themselves"
