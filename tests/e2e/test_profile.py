"""A run on two real ranks at the quickstart's shape (8 problems x 8 rollouts x 64 tokens, TP2, EP2): its traces, and where its seconds are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import configuration, make_world, rows_of, train, write

from megatron_antisd.metrics import STAGES

ALL_STAGES = ["generate", "grade", "teacher", "gate", "step", "sync", "figures"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's directory and what it printed."""
    root = tmp_path_factory.mktemp("profile")
    directory = root / "run"
    raw = configuration(
        make_world(root), directory, profile={"steps": [2]}, checkpoint={"save_hf": False},
        parallel={"tensor_parallel_size": 2, "expert_parallel_size": 2, "timeout_seconds": 60}, grading={"workers": 1},
        rollout={"engine": "megatron", "problems_per_step": 8, "group_size": 8, "max_new_tokens": 64, "max_sequences": 64, "ignore_eos": True},
        trainer={"micro_batch_tokens": 8192, "score_micro_batch_tokens": 8192})
    return directory, train(2, write(raw, root / "run.yaml"))


def test_seconds_of_the_stages_add_up_to_each_step(run: tuple[Path, str]) -> None:
    rows = rows_of(run[0])
    assert [row["step"] for row in rows] == [1, 2, 3]
    named, main = [], []
    for row in rows:
        seconds = {key: value for key, value in row.items() if key.startswith("seconds_") and not key.startswith("seconds_hidden_")}
        total = seconds.pop("seconds_total")
        assert seconds.keys() == {f"seconds_{stage}" for stage in ALL_STAGES}
        assert sum(seconds.values()) <= total, row
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / total)
        named.append(sum(seconds.values()) / total)
        main.append(sum(seconds[f"seconds_{stage}"] for stage in STAGES) / total)
    # What no stage holds is small, and so is what stands between the five stages of every row, at a shape as small as this. Of one step: a
    # busy machine may take the processor away anywhere.
    assert max(named) >= 0.97 and max(main) >= 0.97, (named, main)


def test_each_rank_writes_one_trace_with_all_stages_in_order(run: tuple[Path, str]) -> None:
    directory, output = run
    assert f"step 2: profiler traces of all ranks are in {directory / 'profile'}" in output
    assert sorted(path.name for path in (directory / "profile").iterdir()) == [
        f"step_000002_rank_000{rank}.{end}" for rank in (0, 1) for end in ("json.gz", "txt")]
    row = rows_of(directory)[1]
    for rank in (0, 1):
        events = json.loads(gzip.decompress((directory / "profile" / f"step_000002_rank_000{rank}.json.gz").read_bytes()))["traceEvents"]
        complete = [event for event in events if event.get("ph") == "X"]
        (step,) = (event for event in complete if event["name"] == "ProfilerStep#2")
        stages = sorted((e for e in complete if e["name"] in ALL_STAGES and e["cat"] == "user_annotation"), key=lambda e: e["ts"])
        assert [event["name"] for event in stages] == ALL_STAGES
        assert sum(event["dur"] for event in stages) >= 0.9 * step["dur"]
        for event in stages if rank == 0 else []:  # the row is rank 0's clock; microseconds against seconds
            assert event["dur"] / 1e6 == pytest.approx(row[f"seconds_{event['name']}"], rel=0.05, abs=0.05)
        check_work_stands_in_its_stage(complete, {event["name"]: event for event in stages})
        assert "aten::mm" in (directory / "profile" / f"step_000002_rank_000{rank}.txt").read_text()


def check_work_stands_in_its_stage(complete: list[dict[str, Any]], stages: dict[str, dict[str, Any]]) -> None:
    """Matrix products of model passes lie within the stages that run the model; backward and optimizer within `step` alone."""
    def within(event: dict[str, Any]) -> set[str]:
        return {name for name, stage in stages.items() if stage["ts"] <= event["ts"] <= stage["ts"] + stage["dur"]}

    products = [within(event) for event in complete if event["name"] == "aten::mm"]
    assert set.union(*products) == {"generate", "teacher", "step", "sync"}  # sync: the probe's scoring
    backward = [within(event) for event in complete if event["name"].startswith("autograd::engine::evaluate_function")]
    assert backward and all(names == {"step"} for names in backward)
