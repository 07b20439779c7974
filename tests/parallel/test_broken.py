"""What is not finite is named by rank and position, before any weight is lost."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from distributed import run_ranks
from tiny import make_checkpoint


def test_broken_hidden_states_are_named(tmp_path: Path) -> None:
    run_ranks(Path(__file__).with_name("broken_ranks.py"), 2, str(make_checkpoint(tmp_path / "moe", moe=True)), str(tmp_path / "result.pt"))
    result = torch.load(tmp_path / "result.pt")
    # The broken id is the third of five response tokens of the last view. Attention's kernel multiplies what it masks by 0, and 0 times NaN is
    # NaN, so earlier tokens of that view may break too, and no token of another view.
    tokens = range(result["first_token"], result["first_token"] + 4)
    for rank, (message, lines, skipped) in enumerate(result["found"]):
        assert f"rank {rank}: hidden states are not finite, first in row" in message
        assert int(re.search(r"predicts response token (\d+) of the scored batch", message)[1]) in tokens
        assert skipped and any(f"rank {rank}: hidden states are not finite" in line for line in lines)
