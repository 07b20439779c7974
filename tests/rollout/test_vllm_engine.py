"""vLLM inside the trainer's processes, against transformers: log-probs, weight updates and the failures that would be silent."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (tools/setup_env.sh installs it)")

# Mean |engine - transformers| log-prob in nats over all response tokens of tiny random models, float32. Measured: 1e-6 to 2e-6.
AGREES = 1e-4
# The same where the engine computes with other weights: measured 2.2 to 3.2.
OTHER_WEIGHTS = 0.5
LAYOUTS = ("dense_tp1", "dense_tp2", "moe_tp1", "moe_tp2")


def read_facts(output: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("FACTS ")) for line in output.splitlines() if line.startswith("FACTS ")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("models")
    run_ranks(HERE / "vllm_ranks.py", 2, str(folder), timeout=400)
    return [json.loads((folder / f"facts_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def facts(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return ranks[0]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "vllm_single.py"), str(tmp_path_factory.mktemp("single"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_facts(done.stdout)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_the_model_before_and_after_an_update(facts: dict[str, Any], layout: str) -> None:
    """Prompts of 300 tokens: the cache holds two full blocks of them when the weights change."""
    update = facts[layout]["update"]
    assert update["before"] < AGREES
    assert update["after_vs_new"] < AGREES
    assert update["after_again"] < AGREES
    assert update["after_vs_old"] > OTHER_WEIGHTS
    assert update["version"] == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_update_test_sees_a_stale_prefix_cache(facts: dict[str, Any], layout: str) -> None:
    assert facts[layout]["update"]["stale_cache"] > OTHER_WEIGHTS


@pytest.mark.parametrize("layout", ["moe_tp1", "moe_tp2"])
def test_the_update_test_sees_experts_that_were_not_packed(facts: dict[str, Any], layout: str) -> None:
    assert facts[layout]["experts"]["unpacked_experts"] > OTHER_WEIGHTS
    assert facts[layout]["experts"]["repaired"] < AGREES


@pytest.mark.parametrize("layout", ["dense_tp1", "moe_tp2"])
def test_sampling(facts: dict[str, Any], layout: str) -> None:
    found = facts[layout]["sampling"]
    assert found["same_seed_same_tokens"] and found["order_kept"] and found["group_differs"]
    assert found["each_is_reported_once"] and found["reported_while_decoding"]
    assert found["other_seed_other_tokens"] == 7
    assert found["fixed_lengths"] == [12] and found["fixed_truncated"]
    assert found["cut_at_stop"] and 0 < found["stopped"] < 24
    assert found["few"] == 1 and found["none"] == 0, "fewer requests than replicas"


@pytest.mark.parametrize("layout", ["dense_tp1", "moe_tp2"])
def test_a_quota_gives_up_whole_groups_and_changes_no_draw(facts: dict[str, Any], layout: str) -> None:
    found = facts[layout]["sampling"]["quota"]
    assert all(found.values()), found


@pytest.mark.parametrize("layout", ["dense_tp1", "moe_tp2"])
def test_log_probs_are_those_of_the_sampling_distribution(facts: dict[str, Any], layout: str) -> None:
    found = facts[layout]["sampling"]
    assert found["cool"] < AGREES, "at temperature 0.5 they are log softmax(logits / 0.5)"
    assert 0 < found["nucleus_gain"] <= 0.6932, "in the nucleus of at least half the mass they rise, by log 2 at most"
    assert found["nucleus_max"] <= 0


def test_a_request_that_cannot_run_is_refused_and_the_engine_stays_usable(facts: dict[str, Any]) -> None:
    found = facts["dense_tp1"]["sampling"]
    assert "request 7: a prompt of 501 tokens + max_new_tokens 12 = 513 exceeds the context of 512" in found["too_long"]
    assert "token id outside 0..127: 5..128" in found["foreign_id"]
    assert found["usable_after_refusal"]


def test_one_failing_rank_raises_on_all_and_at_once(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        found = facts["moe_tp1"]["failures"]
        assert found["one_rank"] == "generate failed on ranks [1]: RuntimeError: out of something"
        assert found["one_rank_seconds"] < 20
        assert "cannot go on after: generate failed on ranks [1]" in found["later"]
        assert found["disagreement"].startswith("ranks [1] passed other requests")


def test_a_stream_that_does_not_fit_is_read_to_its_end_and_refused(ranks: list[dict[str, Any]]) -> None:
    for facts in ranks:
        found = facts["moe_tp1"]["failures"]
        assert "unknown ['model.surprise']" in found["unknown"]
        assert "missing ['model.norm.weight']" in found["missing"]
        assert "torch.Size([7])" in found["shape"]
        assert [found[f"{case}_left_unread"] for case in ("unknown", "missing", "shape")] == [0, 0, 0]
        assert found["version"] == 5, "a failed update is not a new version"


def test_the_trainer_keeps_its_process_as_it_was(ranks: list[dict[str, Any]]) -> None:
    """Threads, default dtype, gradient mode, random state, torchrun's variables and the default process group."""
    for facts in ranks:
        assert facts["state_kept"]
        assert facts["group_alive"] == 2.0


def test_one_process_without_a_launcher(single: dict[str, Any]) -> None:
    """From random weights, then an update, beside Megatron's CPU support."""
    assert single["difference"] < AGREES
    assert not single["group_left"]
    assert "does not divide the world of 1 ranks" in single["too_many"]


def test_an_engine_whose_weights_were_updated_is_freed_when_it_is_closed(single: dict[str, Any]) -> None:
    assert single["layers_left"] == []


def test_bfloat16(single: dict[str, Any]) -> None:
    """Against the float32 model: measured 0.031 with weights of standard deviation 0.2; the reload of the same weights is exact."""
    assert 1e-4 < single["bfloat16"] < 0.1
    assert single["bfloat16_same_after_reload"]


def test_groups(single: dict[str, Any]) -> None:
    assert single["ids"] == ["a", "b", "a"]
    assert single["indices"] == [[0, 1, 2, 3]] * 3
    assert single["prompts_kept"] and single["texts"]
    assert single["versions"] == [4]
    assert single["repeatable"] and single["new_each_step"] == 3
    assert single["distinct"] == 12, "a problem that stands in a batch twice gets its own draws each time"


def test_a_full_cache_costs_time_alone(single: dict[str, Any]) -> None:
    """Sequences that are given up for want of cache are computed again: the same tokens, log-probs and experts."""
    found = single["full_cache"]
    assert found["given_up"][0] == 0 and found["given_up"][1] > 0
    assert found["same_tokens"] and found["same_routes"] and found["difference"] < AGREES
