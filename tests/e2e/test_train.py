"""Real runs of the training program on two ranks: everything together once, the same run replayed on one rank, and what goes wrong on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_views
from tiny_world import World, configuration, launch, make_world, rows_of, train, write

from megatron_antisd.config import dump_config, load_config
from megatron_antisd.metrics import SAMPLE_KEYS, STEP_KEYS, TOKEN_U_KEYS

FAULTS = Path(__file__).with_name("faults.py")
TP2_EP2 = {"tensor_parallel_size": 2, "expert_parallel_size": 2, "timeout_seconds": 60}
SCORE, REPLAY = 2e-5, 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """The directory of a run with everything on: tensor, sequence and expert parallel 2, vLLM, evaluation, checkpoints, export."""
    directory = world.root / "whole"
    raw = configuration(
        world, directory, parallel=TP2_EP2, checkpoint={"every": 2}, gate={"mode": "always"}, logging={"tensorboard": True},
        evaluation={"every": 3, "benchmarks": [{"name": "held-out", "path": str(world.benchmark), "samples": 2}]},
        debug={"save_rollouts": str(world.root / "rollouts")})
    done = launch(2, FAULTS, f"score_at_the_end={world.root / 'scores.pt'}", write(raw, world.root / "whole.yaml"))
    assert done.returncode == 0, done.stdout[-6000:]
    return directory


def test_metrics_are_complete_and_engine_and_trainer_agree(whole: Path) -> None:
    rows = rows_of(whole)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(STEP_KEYS) <= row.keys()
        assert row["mismatch_max"] < 1e-4 and row["probe_max"] < 1e-4
        assert row["padding_share"] < 0.01
        assert row["policy_version"] == row["step"] and row["updates_skipped"] == 0
        assert all(math.isfinite(row[key]) for key in STEP_KEYS if row[key] is not None)
        stages = [value for key, value in row.items() if key.startswith("seconds_") and not key.startswith(("seconds_total", "seconds_hidden_"))]
        assert 0.97 * row["seconds_total"] <= sum(stages) <= row["seconds_total"]
    assert [row["lambda"] for row in rows] == [0.0, 0.5, 0.5]


def test_evaluations_samples_and_token_kinds_are_written(whole: Path) -> None:
    def read(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (whole / name).read_text().splitlines()]

    evaluations = [row for row in read("metrics.jsonl") if "eval/held-out/avg@2" in row]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert all(0 <= row[f"eval/held-out/{key}"] <= 1 for row in evaluations for key in ("avg@2", "pass@1", "pass@2", "truncation_rate"))
    samples, kinds = read("samples.jsonl"), read("token_u.jsonl")
    assert [row["step"] for row in samples] == [0, 0, 3, 3] and all(set(SAMPLE_KEYS) <= row.keys() for row in samples)
    assert {row["step"] for row in kinds} == {3} and all(set(TOKEN_U_KEYS) <= row.keys() for row in kinds)
    assert sum(row["count"] for row in kinds) <= rows_of(whole)[-1]["tokens"]
    assert list((whole / "tensorboard").iterdir())


def test_resolved_configuration_reads_back_equal(world: World, whole: Path) -> None:
    given = load_config(world.root / "whole.yaml")
    kept = load_config(whole / "config.yaml")
    assert kept == given and dump_config(kept) == (whole / "config.yaml").read_text()


def test_export_is_the_trainers_policy_in_transformers(world: World, whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "hf", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(world.checkpoint, dtype=torch.float32)
    log_prob, entropy = torch.load(world.root / "scores.pt")
    assert (log_prob - transformers_log_probs(model)).abs().max() < SCORE
    assert (log_prob - transformers_log_probs(start)).abs().max() > 100 * SCORE, "the policy has moved"
    assert entropy.isfinite().all()
    tokenizer = AutoTokenizer.from_pretrained(whole / "hf")
    assert tokenizer.chat_template and tokenizer("add 1 2")["input_ids"] == AutoTokenizer.from_pretrained(world.checkpoint)("add 1 2")["input_ids"]
    assert json.loads((whole / "hf/config.json").read_text()) == json.loads((world.checkpoint / "config.json").read_text())


@torch.no_grad()
def transformers_log_probs(model: torch.nn.Module) -> torch.Tensor:
    found = []
    for view in make_views():
        logits = model(torch.tensor([[*view.prompt_ids, *view.response_ids]])).logits[0, len(view.prompt_ids) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(view.response_ids)[:, None])[:, 0])
    return torch.cat(found)


def test_one_rank_replays_the_run(world: World, whole: Path) -> None:
    """The same rollouts on another layout (and another engine beside it): the same losses, gradients and gate."""
    directory = world.root / "replayed"
    raw = configuration(world, directory, rollout={"engine": "megatron"}, gate={"mode": "always"},
                        debug={"load_rollouts": str(world.root / "rollouts")})
    train(1, write(raw, world.root / "replayed.yaml"))
    for mine, theirs in zip(rows_of(directory), rows_of(whole), strict=True):
        for key in ("loss", "grad_norm", "u_mean", "phi_mean", "student_entropy_mean", "teacher_entropy_median", "gate_warm"):
            assert mine[key] == pytest.approx(theirs[key], abs=REPLAY, rel=REPLAY), key
        for key in ("lambda", "gate_open", "reward_mean", "tokens", "truncation_rate"):
            assert mine[key] == theirs[key], key
        assert mine["mismatch_max"] < 1e-3, "the replayed log-probs are those of the same policy"


def test_updates_that_are_not_finite_are_skipped_and_the_run_stops_when_they_go_on(world: World) -> None:
    """faults.not_finite says what breaks; it also asserts, on every rank, that a skipped step leaves the weights as they are."""
    directory = world.root / "not_finite"
    raw = configuration(world, directory, run={"steps": 9}, rollout={"engine": "megatron"}, optimizer={"max_skipped_in_a_row": 2},
                        parallel={"expert_parallel_size": 2})
    done = launch(2, FAULTS, "not_finite", write(raw, world.root / "not_finite.yaml"))
    assert done.returncode != 0
    assert done.stdout.count("2 updates in a row were left out (optimizer.max_skipped_in_a_row)") >= 2, done.stdout[-6000:]
    assert "step 2: not finite: loss nan, gradient norm nan; the update is left out [health.non_finite.action]" in done.stdout
    rows = rows_of(directory)
    assert [row["updates_skipped"] for row in rows] == [0, 1, 0, 1, 1]
    assert [row["policy_version"] for row in rows] == [1, 1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, False, True, False]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, True]
    assert [row["u_mean"] is None for row in rows] == [False, False, False, True, False]
    assert [row["probe_mean"] is None for row in rows] == [False, True, False, True, True], "an engine that holds the policy is left alone"


@pytest.mark.slow
def test_an_engine_that_dies_and_may_not_be_restarted_ends_the_run_on_all_ranks(world: World) -> None:
    directory = world.root / "dies"
    raw = configuration(world, directory, parallel=TP2_EP2, checkpoint={"every": 1}, evaluation={"every": 3}, rollout={"max_restarts": 0})
    config = write(raw, world.root / "dies.yaml")
    done = launch(2, FAULTS, "engine_dies=3", config)
    assert done.returncode != 0
    said = done.stdout.count("EngineError: the engine failed once in this process, and rollout.max_restarts=0; the last failure: generate failed on "
                             "ranks [1]: RuntimeError: the engine core died unexpectedly")
    assert said == 2, done.stdout[-6000:]
    assert [row["step"] for row in rows_of(directory)] == [1, 2]
    from megatron_antisd.checkpoint import latest_checkpoint

    assert latest_checkpoint(directory / "checkpoints") == directory / "checkpoints" / "step_000002"
    output = train(2, config)
    assert "resumed from" in output and [row["step"] for row in rows_of(directory)] == [1, 2, 3]
    assert (directory / "hf" / "config.json").is_file()
