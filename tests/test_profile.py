"""The step profiler in one process: what it writes, that it does nothing when off, self times against a naive sum, its configuration."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_antisd.config import ConfigError, ProfileConfig, build_config, rules
from megatron_antisd.metrics import StageTimer, StepProfiler
from megatron_antisd.metrics.profile import self_times, summary

ROOT = Path(__file__).resolve().parents[1]


def run_steps(directory: Path, config: ProfileConfig, steps: int = 3) -> tuple[list[bool], int]:
    """Which steps were traced, and how often the ranks met."""
    barriers: list[int] = []
    profile = StepProfiler(config, directory, rank=5, barrier=lambda: barriers.append(1))
    traced = []
    for step in range(1, steps + 1):
        with profile(step) as named_range, StageTimer(named_range=named_range) as timer:
            traced.append(named_range is not None)
            with timer("generate"):
                torch.ones(4, 3) @ torch.ones(3, 2)
    return traced, len(barriers)


def events_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_named_steps_are_traced_and_no_others(tmp_path: Path) -> None:
    assert run_steps(tmp_path, ProfileConfig(steps=(1, 3))) == ([True, False, True], 4)
    names = [f"step_00000{step}_rank_0005.{end}" for step in (1, 3) for end in ("json.gz", "txt")]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names, "and no temporary file is left"
    for step in (1, 3):
        ranges = {event["name"]: event for event in events_of(tmp_path / "profile" / f"step_00000{step}_rank_0005.json.gz") if event["ph"] == "X"}
        outer, stage, product = (ranges[name] for name in (f"ProfilerStep#{step}", "generate", "aten::mm"))
        for around, inside in ((outer, stage), (stage, product)):
            assert around["ts"] <= inside["ts"] and inside["ts"] + inside["dur"] <= around["ts"] + around["dur"]
        text = (tmp_path / "profile" / f"step_00000{step}_rank_0005.txt").read_text()
        assert "aten::mm" in text and "generate" in text and "GPU" not in text


def test_off_is_nothing(tmp_path: Path) -> None:
    assert run_steps(tmp_path, ProfileConfig()) == ([False] * 3, 0)
    assert not list(tmp_path.iterdir())


def test_reports_still_read_metrics_without_torch() -> None:
    program = "import sys; import megatron_antisd.metrics; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_step_that_fails_fails_with_its_own_error_and_leaves_the_profiler_usable(tmp_path: Path) -> None:
    profile = StepProfiler(ProfileConfig(steps=(1, 2)), tmp_path, rank=0, barrier=lambda: None)
    with pytest.raises(ZeroDivisionError), profile(1):
        1 / 0  # noqa: B018
    assert not (tmp_path / "profile").exists()
    with profile(2):
        torch.ones(1).exp()
    assert any(event["name"] == "aten::exp" for event in events_of(tmp_path / "profile/step_000002_rank_0000.json.gz"))


def test_directory_and_options(tmp_path: Path) -> None:
    elsewhere = tmp_path / "else/where"
    run_steps(tmp_path, ProfileConfig(steps=(1,), directory=str(elsewhere), shapes=True, stack=True, memory=True), steps=1)
    assert not (tmp_path / "profile").exists()
    events = events_of(elsewhere / "step_000001_rank_0005.json.gz")
    (product,) = (event for event in events if event["name"] == "aten::mm")
    assert product["args"]["Input Dims"] == [[4, 3], [3, 2]]
    kinds = Counter(event.get("cat") for event in events)
    assert kinds["python_function"] and any(event["name"] == "[memory]" for event in events)


def test_self_times_against_a_naive_sum() -> None:
    """Random nested ranges: each one's time less that of the ranges directly inside it, found by looking at all pairs."""
    rng = random.Random(0)
    ranges: list[tuple[float, float, str]] = []

    def fill(start: int, end: int, depth: int) -> None:
        ranges.append((start, end - start, f"r{len(ranges)}"))
        cuts = sorted(rng.sample(range(start, end + 1), min(6, end - start + 1)))
        for low, high in zip(cuts[::2], cuts[1::2], strict=False):
            if depth and high > low and (low, high) != (start, end):
                fill(low, high, depth - 1)

    for root in range(5):
        fill(1000 * root, 1000 * root + 900, 3)
    assert len(ranges) > 40

    def inside(inner: tuple[float, float, str], outer: tuple[float, float, str]) -> bool:
        return inner[2] != outer[2] and outer[0] <= inner[0] and inner[0] + inner[1] <= outer[0] + outer[1]

    expected = {}
    for outer in ranges:
        below = [r for r in ranges if inside(r, outer)]
        direct = [r for r in below if not any(inside(r, other) for other in below)]
        expected[outer[2]] = outer[1] - sum(r[1] for r in direct)
    shuffled = rng.sample(ranges, len(ranges))
    assert dict(self_times(shuffled)) == expected
    assert sum(expected.values()) == 5 * 900


def test_summary_keeps_threads_apart_and_gpu_from_cpu() -> None:
    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid}

    events = [
        event("user_annotation", "generate", 0, 3e6), event("cpu_op", "aten::mm", 1e6, 1e6),
        event("cpu_op", "aten::mm", 1e6, 1e6, tid=2),  # another thread: nothing is taken from `generate` for it
        event("python_function", "train.py(1)", 0, 9e6), event("gpu_user_annotation", "generate", 0, 3e6, tid=7),
        event("kernel", "gemm", 0, 5e5, tid=7), event("gpu_memcpy", "HtoD", 6e5, 25e4, tid=7), {"ph": "M", "name": "process_name"}]
    rows = [line.split() for line in summary(events).splitlines() if line]
    assert rows == [
        ["CPU", "calls", "seconds", "share"], ["generate", "1", "2.0000", "50.0%"], ["aten::mm", "2", "2.0000", "50.0%"],
        ["GPU", "calls", "seconds", "share"], ["gemm", "1", "0.5000", "66.7%"], ["HtoD", "1", "0.2500", "33.3%"]]
    assert summary([]) == ""


@pytest.mark.parametrize(("steps", "said"), [([0, 2, 9, -1], "0, 9, -1 must lie from 1 to run.steps=3"), ([4], "4 must lie")])
def test_steps_that_never_run_are_named(steps: list[int], said: str) -> None:
    raw = {"model": {"path": "m"}, "data": {"train": ["t"]}, "run": {"steps": 3}, "rollout": {"engine": "megatron"}}
    with pytest.raises(ConfigError) as error:
        rules.check_layout(build_config(raw | {"profile": {"steps": steps}}), {}, 1)
    assert f"profile.steps={steps}: {said}" in str(error.value)
    for fine in ([], [1], [3, 1, 2]):
        with pytest.raises(ConfigError) as error:
            rules.check_layout(build_config(raw | {"profile": {"steps": fine}}), {}, 1)
        assert "profile" not in str(error.value), "the empty model is the only problem"
