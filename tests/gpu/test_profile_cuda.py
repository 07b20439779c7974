"""A traced step on a GPU: kernels are in the trace, inside their stage, and in the table of the longest."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_antisd.config import ProfileConfig
from megatron_antisd.metrics import StageTimer, StepProfiler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_kernels_stand_in_their_stage(tmp_path: Path) -> None:
    profile = StepProfiler(ProfileConfig(steps=(1,)), tmp_path, rank=0, barrier=lambda: None)
    given = torch.randn(512, 512, device="cuda")
    with profile(1) as named_range, StageTimer(torch.cuda.synchronize, named_range) as timer, timer("teacher"):
        given @ given
    events = json.loads(gzip.decompress((tmp_path / "profile/step_000001_rank_0000.json.gz").read_bytes()))["traceEvents"]
    (stage,) = (event for event in events if event["name"] == "teacher" and event.get("cat") == "user_annotation")
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert kernels
    for kernel in kernels:
        assert stage["ts"] <= kernel["ts"] and kernel["ts"] + kernel["dur"] <= stage["ts"] + stage["dur"]
    assert "GPU" in (tmp_path / "profile/step_000001_rank_0000.txt").read_text()
