"""Samples on disk: what survives an interruption, and what is never mixed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_antisd.evaluation.store import SampleStore, StoreError, read_samples

HEADER = {"benchmark": "b", "step": 3, "samples": 2, "sampling": {"temperature": 0.7, "stop_token_ids": (1, 2)}}


def rows(problem_id: str, text: str = "so \\boxed{4}\u2028\ud800") -> dict[str, list[dict[str, Any]]]:
    return {problem_id: [{"problem_id": problem_id, "index": i, "reward": float(i), "feedback": "f", "truncated": False, "tokens": 3, "answer": "4",
                          "text": text} for i in range(2)]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "step_000003" / "b.jsonl"


def test_samples_come_back(path: Path) -> None:
    store = SampleStore(path, HEADER)
    store.append(rows("p") | rows("q"))
    again = SampleStore(path, HEADER)
    assert again.complete("p") and again.complete("q") and not again.complete("r")
    assert [row["reward"] for row in again.rows("q")] == [0.0, 1.0] and again.rows("p")[0]["text"].startswith("so \\boxed{4}\u2028")
    header, samples = read_samples(path)
    assert header["samples"] == 2 and len(samples) == 4


@pytest.mark.parametrize("cut", [1, 40, 150])
def test_a_problem_cut_short_is_sampled_again(path: Path, cut: int) -> None:
    store = SampleStore(path, HEADER)
    store.append(rows("p") | rows("q"))
    path.write_bytes(path.read_bytes()[:-cut])
    again = SampleStore(path, HEADER)
    assert again.complete("p") and not again.complete("q")
    again.append(rows("q"))
    assert [(row["problem_id"], row["index"]) for row in read_samples(path)[1]] == [("p", 0), ("p", 1), ("q", 0), ("q", 1)]


def test_samples_of_something_else_are_moved_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SampleStore(path, HEADER).append(rows("p"))
    with caplog.at_level(logging.WARNING):
        other = SampleStore(path, HEADER | {"sampling": {"temperature": 1.0}})
    assert not other.complete("p") and "(sampling differ)" in caplog.text
    assert len(read_samples(path.with_name("b.old-1.jsonl"))[1]) == 2
    assert read_samples(path)[1] == []


def test_what_is_broken_is_named(path: Path) -> None:
    store = SampleStore(path, HEADER)
    with pytest.raises(StoreError, match="'p' has samples \\[0\\]"):
        store.append({"p": rows("p")["p"][:1]})
    store.append(rows("p"))
    path.write_text(path.read_text() + '{"problem_id": "q"}\n')
    with pytest.raises(StoreError, match="line 4 is no sample"):
        SampleStore(path, HEADER)
    path.write_text("")
    with pytest.raises(StoreError, match="no header"):
        SampleStore(path, HEADER)
