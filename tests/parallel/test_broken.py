"""What is not finite is named by rank and position, before any weight is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from tiny import make_checkpoint

LAYOUTS = {"tp2": "parallel.tensor_parallel_size=2", "dp2": "parallel.tensor_parallel_size=1", "pp2": "parallel.pipeline_parallel_size=2"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_broken_hidden_states_are_named(tmp_path: Path, layout: str) -> None:
    """Every rank raises, whichever of them has the broken row; none waits for another."""
    run_ranks(Path(__file__).with_name("broken_ranks.py"), 2, str(make_checkpoint(tmp_path / "moe", moe=True)), str(tmp_path / "result.pt"),
              LAYOUTS[layout])
    result = torch.load(tmp_path / "result.pt")
    # The broken id is the third of five response tokens of the last view. Attention's kernel multiplies what it masks by 0, and 0 times NaN is
    # NaN, so earlier tokens of that view may break too, and no token of another view.
    tokens = range(result["first_token"], result["first_token"] + 4)
    scoring, training = [], []
    for rank, (message, lines, skipped) in enumerate(result["found"]):
        assert int(re.search(r"scored response tokens are not finite, first that of token (\d+), nan", message)[1]) in tokens
        assert skipped
        for line in (line for line in lines if f"rank {rank}: hidden states are not finite, first in row" in line):
            found = re.search(r"predicts response token (\d+)", line)
            (training if found is None else scoring).append(rank if found is None else int(found[1]))
    assert scoring and set(scoring) <= set(tokens)
    assert len(training) == (2 if layout == "tp2" else 1), "each rank that has the row names itself"
