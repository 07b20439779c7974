"""Every method and option through the whole loop on one rank with the in-process engine: two steps each, all in one process.

With `gate.warmup_steps` 1 and `gate.mode` always, step 1 is plain GRPO for every method and step 2 works with lambda = 0.5 on the very
rollouts that GRPO's step 2 has, since the weights and the seeds are the same. So the losses must differ by exactly the method's term.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import World, configuration, launch, make_world, rows_of, write

from megatron_antisd.metrics import STEP_KEYS
from megatron_antisd.records import RolloutGroup
from megatron_antisd.rollout.replay import load_rollouts

SCRIPT = Path(__file__).with_name("variants.py")
LOSS = 2e-6
ALWAYS = {"gate": {"mode": "always", "warmup_steps": 1}}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "grpo": {"algorithm": {"method": "grpo"}},
    "shadow": {"algorithm": {"method": "grpo", "shadow": True}},
    "lambda_max=0": {"algorithm": {"lambda_max": 0.0}},
    "antisd": {**ALWAYS},
    "multiplicative": {"algorithm": {"compose": "multiplicative"}, **ALWAYS},
    "sd": {"algorithm": {"method": "sd"}, **ALWAYS},
    "reverse_kl": {"algorithm": {"method": "reverse_kl"}, **ALWAYS},
    "no_teacher": {"algorithm": {"method": "no_teacher"}, **ALWAYS},
    "gate-teacher": {"gate": {"down": 0.01}},
    "gate-closes": {"gate": {"down": 0.999999}},
    "gate-student": {"gate": {"mode": "student", "down": 0.01}},
    "updates": {"algorithm": {"updates_per_batch": 2}, **ALWAYS},
    "drop": {"algorithm": {"method": "grpo", "zero_variance": "drop"}},
    "sequence_mean": {"algorithm": {"method": "grpo", "loss": "sequence_mean"}},
    "biased": {"algorithm": {"method": "grpo", "std": "biased"}},
    "temperature": {"rollout": {"temperature": 0.6}},
    "ignore_eos": {"rollout": {"ignore_eos": True}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "recompute": {"model": {"recompute": "full"}, "algorithm": {"method": "grpo"}},
    "warmup": {"algorithm": {"method": "grpo"}, "optimizer": {"warmup_steps": 4}},
}


FAST = ("grpo", "shadow", "antisd", "multiplicative", "sd", "reverse_kl", "no_teacher", "updates")


@dataclass(frozen=True)
class Result:
    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("variants"))


class Results:
    """Trains when a test first asks: the fast variants in one process, the others in another."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._found: dict[str, Result] = {}

    def __getitem__(self, name: str) -> Result:
        if name not in self._found:
            self._train(FAST if name in FAST else tuple(n for n in VARIANTS if n not in FAST))
        return self._found[name]

    def _train(self, names: tuple[str, ...]) -> None:
        root, configs = self._world.root, []
        for name in names:
            sections = {**VARIANTS[name], "run": {"steps": 2}, "rollout": {"engine": "megatron", **VARIANTS[name].get("rollout", {})},
                        "debug": {"save_rollouts": str(root / "rollouts" / name)}}
            configs.append(write(configuration(self._world, root / name, **sections), root / f"{name}.yaml"))
        done = launch(1, SCRIPT, *configs, timeout=250)
        assert done.returncode == 0, done.stdout[-6000:]
        self._found |= {name: Result(rows_of(root / name), weights_of(root / name / "hf")) for name in names}


@pytest.fixture(scope="module")
def results(world: World) -> Results:
    return Results(world)


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def group_sums(groups: list[RolloutGroup]) -> tuple[list[list[float]], list[list[int]]]:
    """(A_seq, response lengths) of every group, in plain Python."""
    advantages, lengths = [], []
    for group in groups:
        rewards = [r.reward for r in group.rollouts]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        advantages.append([(r - mean) / (spread + 1e-6) if spread else 0.0 for r in rewards])
        lengths.append([len(r.response_ids) for r in group.rollouts])
    return advantages, lengths


def phi(u: float) -> float:
    return 0.5 * (math.log1p(math.exp(u)) - math.log(2))


def fast_or_slow(names: Iterable[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", fast_or_slow(VARIANTS))
def test_rows_are_whole_and_the_policy_moves(world: World, results: Results, name: str) -> None:
    rows, weights = results[name].rows, results[name].weights
    assert [row["step"] for row in rows] == [1, 2]
    start = load_file(world.checkpoint / "model.safetensors")
    assert weights.keys() == start.keys()
    assert any(not torch.equal(tensor, start[key].to(tensor.dtype)) for key, tensor in weights.items())
    updates = 2 if name == "updates" else 1
    for row in rows:
        assert set(STEP_KEYS) <= row.keys()
        assert row["updates_skipped"] == 0 and row["policy_version"] == row["step"] * updates
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0 or (row["zero_variance_groups"], row["lambda"]) == (4, 0.0)
        assert row["mismatch_max"] < (1e-4 if name != "bfloat16" else 0.5), "engine and trainer agree on every sampled token"
        assert row["probe_max"] < (1e-4 if name != "bfloat16" else 0.5)
        assert row["padding_share"] == 0.0
        assert row["teacher_masked_rollouts"] in (0, None), "the reference solution stands in for a missing peer"


@pytest.mark.parametrize("name", fast_or_slow(["shadow", "lambda_max=0"]))
def test_shadow_and_lambda_0_are_bitwise_grpo(results: Results, name: str) -> None:
    mine, grpo = results[name], results["grpo"]
    assert [(r["loss"], r["grad_norm"], r["reward_mean"]) for r in mine.rows] == [(r["loss"], r["grad_norm"], r["reward_mean"]) for r in grpo.rows]
    assert all(torch.equal(tensor, grpo.weights[key]) for key, tensor in mine.weights.items())


def test_shadow_logs_what_antisd_would_have_done(results: Results) -> None:
    rows, grpo = results["shadow"].rows, results["grpo"].rows
    assert [row["lambda"] for row in rows] == [0.0, 0.0]
    assert rows[0]["shadow_lambda"] == 0.0 and rows[1]["shadow_lambda"] in (0.0, 0.5)
    assert rows[0]["u_mean"] is not None and rows[0]["gate_warm"] == rows[0]["teacher_entropy_median"]
    assert all(row["u_mean"] is row["teacher_entropy_median"] is row["gate_open"] is row["shadow_lambda"] is None for row in grpo)


def test_first_step_is_grpo_whatever_the_method(results: Results) -> None:
    for name in ("antisd", "multiplicative", "sd", "reverse_kl", "no_teacher"):
        assert results[name].rows[0]["lambda"] == 0.0
        assert results[name].rows[0]["loss"] == results["grpo"].rows[0]["loss"], name


def test_losses_differ_by_the_methods_term(world: World, results: Results) -> None:
    """loss = -mean over tokens of (A_seq + term), on-policy; the metrics hold the means of u and phi(u)."""
    row = {name: results[name].rows[1] for name in FAST}
    groups = load_rollouts(world.root / "rollouts" / "grpo", 2)
    advantages, lengths = group_sums(groups)
    tokens = sum(map(sum, lengths))
    plain = -sum(a * n for group, counts in zip(advantages, lengths, strict=True) for a, n in zip(group, counts, strict=True)) / tokens
    assert row["grpo"]["tokens"] == tokens and row["grpo"]["loss"] == pytest.approx(plain, abs=LOSS)
    for name in ("antisd", "sd", "reverse_kl", "no_teacher", "multiplicative"):
        assert row[name]["lambda"] == 0.5 and row[name]["tokens"] == tokens, "the same rollouts as GRPO's"
    u, phi_u = row["antisd"]["u_mean"], row["antisd"]["phi_mean"]
    assert abs(u) > 0.01 and abs(phi_u) > 0.01
    assert row["antisd"]["loss"] == pytest.approx(plain + 0.5 * phi_u, abs=LOSS)
    assert row["sd"]["loss"] == pytest.approx(plain - 0.5 * u, abs=LOSS)
    assert row["reverse_kl"]["loss"] == pytest.approx(plain + 0.5 * u, abs=LOSS)
    surprise = sum(phi(-p) for group in groups for r in group.rollouts for p in r.engine_log_probs) / tokens
    assert row["no_teacher"]["loss"] == pytest.approx(plain + 0.5 * surprise, abs=LOSS)
    assert row["multiplicative"]["loss"] not in (row["antisd"]["loss"], row["grpo"]["loss"])


@pytest.mark.slow
def test_denominators(world: World, results: Results) -> None:
    """Step 1 has the same rollouts in all of these."""
    groups = load_rollouts(world.root / "rollouts" / "grpo", 1)
    advantages, lengths = group_sums(groups)
    pairs = [list(zip(group, counts, strict=True)) for group, counts in zip(advantages, lengths, strict=True)]
    mixed = [group for group in pairs if any(a for a, _ in group)]
    assert 0 < len(mixed) < len(pairs), "this seed has flat groups and others"
    expected = -sum(a * n for group in mixed for a, n in group) / sum(n for group in mixed for _, n in group)
    assert results["drop"].rows[0]["loss"] == pytest.approx(expected, abs=LOSS)
    assert results["drop"].rows[0]["zero_variance_groups"] == len(pairs) - len(mixed)
    assert results["drop"].rows[0]["tokens"] == sum(map(sum, lengths)), "tokens that were generated, dropped or not"
    assert results["sequence_mean"].rows[0]["loss"] == pytest.approx(-sum(a for group in pairs for a, _ in group) / 16, abs=LOSS)
    ratio = math.sqrt(4 / 3)  # the biased deviation of four is smaller
    assert results["biased"].rows[0]["loss"] == pytest.approx(results["grpo"].rows[0]["loss"] * ratio, rel=1e-4)


@pytest.mark.slow
def test_gates(results: Results) -> None:
    for name in ("gate-teacher", "gate-closes"):
        first, second = results[name].rows
        assert (first["gate_open"], first["gate_warm"]) == (False, first["teacher_entropy_median"])
        assert second["gate_open"] == (second["teacher_entropy_median"] >= second["gate_down"])
        assert second["lambda"] == (0.5 if second["gate_open"] else 0.0)
    assert results["gate-teacher"].rows[1]["gate_open"]
    assert results["gate-teacher"].rows[1]["loss"] == results["gate-student"].rows[1]["loss"] == results["antisd"].rows[1]["loss"]
    student = results["gate-student"].rows[0]
    assert student["gate_warm"] not in (None, student["teacher_entropy_median"])
    assert results["no_teacher"].rows[0]["gate_warm"] == student["gate_warm"], "without a teacher the gate hears the student"
    assert results["no_teacher"].rows[1]["teacher_entropy_median"] is None


def test_several_updates_a_batch(results: Results) -> None:
    first, second = results["updates"].rows
    whole = results["antisd"].rows[0]
    # The first half is the policy that sampled: its ratio is 1 but for rounding.
    assert first["tokens"] == whole["tokens"] and first["u_mean"] == pytest.approx(whole["u_mean"], abs=1e-6)
    assert first["teacher_entropy_median"] == whole["teacher_entropy_median"]
    assert second["lambda"] == 0.5 and second["policy_version"] == 4


@pytest.mark.slow
def test_responses_to_the_limit(world: World, results: Results) -> None:
    for row in results["ignore_eos"].rows:
        assert (row["tokens"], row["truncation_rate"], row["reward_completed_mean"]) == (16 * 16, 1.0, None)
    assert results["grpo"].rows[0]["truncation_rate"] < 1


def test_rollouts_carry_the_policy_version(world: World, results: Results) -> None:
    for name, factor in (("grpo", 1), ("updates", 2)):
        for step in (1, 2):
            groups = load_rollouts(world.root / "rollouts" / name, step)
            assert {r.policy_version for group in groups for r in group.rollouts} == {(step - 1) * factor}


@pytest.mark.slow
def test_learning_rate_warms_up_and_dtypes_are_kept(world: World, results: Results) -> None:
    assert [row["learning_rate"] for row in results["warmup"].rows] == pytest.approx([0.25e-3, 0.5e-3])
    assert {tensor.dtype for tensor in results["bfloat16"].weights.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in results["grpo"].weights.values()} == {torch.float32}


@pytest.mark.slow
def test_recompute_changes_nothing(results: Results) -> None:
    for mine, plain in zip(results["recompute"].rows, results["grpo"].rows, strict=True):
        assert mine["loss"] == plain["loss"] and mine["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_exported_config_is_loadable(world: World, results: Results) -> None:
    assert json.loads((world.root / "grpo" / "hf" / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert not [name for name in os.listdir(world.root / "grpo") if name.endswith(".incomplete")]
