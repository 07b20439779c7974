"""Experts out of vLLM, on CPU, under `external_launcher`, against transformers' routers in float32: the same sets for every token and layer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import EngineError, Request, Sampling
from megatron_antisd.rollout.vllm_replica import VllmReplica, engine_arguments

HERE = Path(__file__).resolve().parent
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("routes")
    run_ranks(HERE / "routes_ranks.py", 2, str(folder), timeout=300)
    return [json.loads((folder / f"routes_{rank}.json").read_text()) for rank in range(2)]


@needs_vllm
def test_every_token_has_the_experts_of_the_model(facts: list[dict[str, Any]]) -> None:
    """Short prompts and ones of more than a KV block, computed or read from the cache, prefilled alone; on both tensor-parallel ranks."""
    for rank in facts:
        engine = rank["engine"]
        assert [engine[case] for case in ("short", "long", "cached", "prefilled")] == [0, 0, 0, 0], engine
        assert engine["tokens"] == 9 + 12 - 1
        assert engine["same_tokens"] and engine["same_again"], "routes change nothing about what is drawn"
        assert engine["unasked"] == [None] * 6


@needs_vllm
def test_routes_are_the_new_weights_after_an_update(facts: list[dict[str, Any]]) -> None:
    engine = facts[0]["engine"]
    assert engine["after_update"] == 0 and engine["moved"] > 1000


@needs_vllm
def test_a_response_that_was_stopped_and_goes_on_has_routes_of_all_rows(facts: list[dict[str, Any]]) -> None:
    assert facts[0]["engine"]["continued"] == 0


@needs_vllm
def test_sequences_that_had_to_make_room_have_theirs(facts: list[dict[str, Any]]) -> None:
    """Eight sequences that grow beyond a block each, in a cache of fewer blocks than they need."""
    assert facts[0]["blocks"] < 8 and facts[0]["preempted"] == 0


@needs_vllm
@pytest.mark.parametrize("case, message", [("none", "no routes; expected those of 20"), ("short", "routes of 19 tokens; expected those of 20")])
def test_a_response_without_its_routes_is_a_failure_of_the_engine(facts: list[dict[str, Any]], case: str, message: str) -> None:
    assert all("EngineFailure" in rank[case] and message in rank[case] for rank in facts)


@needs_vllm
def test_a_closed_engine_leaves_no_thread(facts: list[dict[str, Any]]) -> None:
    assert all(rank["threads_left"] == [] for rank in facts)


def test_an_engine_built_without_routes_refuses_to_give_any() -> None:
    arguments = engine_arguments(RolloutConfig(), dtype="float32", seed=0, max_context=64, load_format="auto", hf_overrides=None, executor="uni")
    replica = VllmReplica("none", arguments, stall_seconds=10)
    assert not replica.returns_routes
    with pytest.raises(EngineError, match="built without them"):
        replica.add("0", Request(prompt_ids=(1,), seed=0), Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1, ignore_eos=True, routes=True))
