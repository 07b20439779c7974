"""mbridge (https://github.com/ISEEKYAN/mbridge, Apache 2.0) as a second opinion on splitting and merging: bitwise the same shards from one checkpoint
on every rank, and bitwise the same export.

Not compared, because mbridge 0.15.1 is wrong there: expert-tensor parallelism that differs from tensor parallelism (without expert parallelism its
export gathers experts over the tensor-parallel group, whatever theirs is). It has no OLMo-3.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import make_checkpoint

pytest.importorskip("mbridge")

SCRIPT = Path(__file__).with_name("mbridge_ranks.py")
TP2, ETP2, EP2, PP2 = (f"{key}_parallel_size=2" for key in ("tensor", "expert_tensor", "expert", "pipeline"))
CASES = {
    "moe": (1, True, []),
    "moe-ep2": (2, True, [EP2]),
    "moe-tp2-etp2": (2, True, [TP2, ETP2]),
    "moe-pp2": (2, True, [PP2]),
    "moe-tp2-etp2-ep2": (4, True, [TP2, ETP2, EP2]),
    "dense": (1, False, []),
    "dense-tp2": (2, False, [TP2]),
    "dense-tp2-pp2-vpp2": (4, False, [TP2, PP2, "virtual_pipeline_size=2"]),
}
SLOW = {"moe", "moe-pp2", "moe-tp2-etp2-ep2", "dense", "dense-tp2-pp2-vpp2"}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_loads_and_exports_as_mbridge_does(tmp_path: Path, case: str) -> None:
    ranks, moe, overrides = CASES[case]
    checkpoint = make_checkpoint(tmp_path / "model", moe=moe)
    counts = json.loads(run_ranks(SCRIPT, ranks, str(checkpoint), *overrides).splitlines()[-1])
    assert counts["tensors"] == len(load_file(checkpoint / "model.safetensors"))
    layers = 4 // (2 if PP2 in overrides else 1)
    each = 7 + 2 * 4 // (2 if EP2 in overrides else 1) if moe else 8  # without its experts a sparse layer has 7 parameters
    assert counts["parameters"] == layers * each + (1 if PP2 in overrides else 3)
