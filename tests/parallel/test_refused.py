"""An update that is refused leaves nothing behind, whoever refuses it; scores that are not finite say where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from tiny import make_checkpoint

LAYOUTS = {
    "dp2-distributed-optimizer": ["parallel.tensor_parallel_size=1", "parallel.distributed_optimizer=true"],
    "tp2-ep2": ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"],
}


@pytest.mark.parametrize("layout", ["dp2-distributed-optimizer", pytest.param("tp2-ep2", marks=pytest.mark.slow)])
def test_refused_updates_do_not_show(tmp_path: Path, layout: str) -> None:
    """Bitwise, on both ranks; the script itself compares weights, moments and step counts."""
    run_ranks(Path(__file__).with_name("refused_ranks.py"), 2, str(make_checkpoint(tmp_path / "moe", moe=True)), str(tmp_path / "result.pt"),
              *LAYOUTS[layout])
    first, second = torch.load(tmp_path / "result.pt")
    assert first == second, "ranks disagree"
    assert first["stats"] == first["expected"] and first["skipped"] == [False, False]
    assert first["broken"][:3] == [5, 1, 2] and "1 of 8 scored response tokens are not finite, first that of token 5, nan" in first["broken"][3]
