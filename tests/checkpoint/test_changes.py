"""What may differ between a run and the checkpoint it goes on from."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_antisd.config import ConfigError, build_config, known_keys
from megatron_antisd.config.changes import FREE, NEVER, check_changes

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": ["t"]}, "run": {"name": "r"}}


def changed(*, moe: bool = False, before: dict[str, Any] | None = None, **sections: dict[str, Any]) -> list[str]:
    before = build_config(BASE).model_dump(mode="json") if before is None else before
    now = build_config({name: {**BASE.get(name, {}), **sections.get(name, {})} for name in BASE.keys() | sections.keys()})
    return check_changes(before, now, "step_000012", moe=moe)


@pytest.mark.parametrize("sections", [
    {"run": {"steps": 999}}, {"parallel": {"tensor_parallel_size": 2}}, {"trainer": {"micro_batch_tokens": 77}}, {"model": {"path": "elsewhere"}},
    {"health": {"mismatch": {"kl": 1.0}}}, {"logging": {"tensorboard": False}}, {"rollout": {"max_sequences": 3}},
    {"rollout": {"expert_parallel": True}}])
def test_changes_that_go_without_saying_are_told(sections: dict[str, Any]) -> None:
    (line,) = changed(**sections)
    section, values = next(iter(sections.items()))
    assert line.startswith(f"{section}.{next(iter(values))}") and " -> " in line


@pytest.mark.parametrize(("sections", "key"), [
    ({"optimizer": {"lr": 0.5}}, "optimizer.lr"), ({"run": {"seed": 3}}, "run.seed"), ({"rollout": {"group_size": 3}}, "rollout.group_size"),
    ({"data": {"train": ["other"]}}, "data.train"), ({"tails": {"overlong": "mask"}}, "tails.overlong")])
def test_changes_of_what_is_trained_need_a_word(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)step_000012.*{key}: .* -> .*accept_changes=\[{key}\].*free to change are run.name"):
        changed(**{**sections, "run": {**sections.get("run", {}), "steps": 7}})
    assert changed(**sections, checkpoint={"accept_changes": [key]})[0].startswith(key)
    assert changed(**sections, checkpoint={"accept_changes": [key.split(".")[0]]}), "a section stands for its keys"


@pytest.mark.parametrize(("sections", "key"), [
    ({"algorithm": {"method": "grpo"}}, "algorithm.method"), ({"gate": {"warmup_steps": 9}}, "gate.warmup")])
def test_method_and_gate_never_change(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){key}.*continual_from=runs/r"):
        changed(**sections, checkpoint={"accept_changes": ["algorithm", "gate"]})


def test_equal_configurations_and_keys_unknown_before() -> None:
    assert changed() == []
    before = build_config(BASE).model_dump(mode="json")
    del before["optimizer"]["lr"], before["health"]
    assert changed(before=before) == [] == changed(before={}, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"optimizer.lr: 1e-06 -> 0.5"):
        changed(before=before, optimizer={"lr": 0.5})
    assert changed(before=before, health={"mismatch": {"kl": 1.0}})[0].startswith("health.mismatch.kl: ")


def test_a_key_of_a_later_release_changes_what_is_trained_where_it_is_set() -> None:
    before = build_config(BASE).model_dump(mode="json")
    del before["tails"], before["correction"]["upper"]
    assert changed(before=before) == []
    with pytest.raises(ConfigError, match=r"(?s)tails.overlong: 'off' -> 'mask'.*accept_changes=\[tails.overlong\]"):
        changed(before=before, tails={"overlong": "mask"})
    with pytest.raises(ConfigError, match=r"correction.upper: 2.0 -> 3.0"):
        changed(before=before, correction={"upper": 3.0})


def test_what_auto_comes_to_is_compared() -> None:
    """The default model is in bfloat16: experts are replayed under vLLM, and the correction truncates."""
    with pytest.raises(ConfigError, match=r"(?s)routing.replay: 'engine' -> 'off'.*accept_changes=\[routing.replay\]"):
        changed(moe=True, rollout={"engine": "megatron"})
    assert len(changed(moe=False, rollout={"engine": "megatron"})) == 1
    with pytest.raises(ConfigError, match=r"(?s)correction.mode: 'truncate' -> 'off'.*accept_changes=\[model.dtype, correction.mode\]"):
        changed(model={"dtype": "float32"})
    assert changed(moe=True, routing={"replay": "engine"}, correction={"mode": "truncate"}) == [], "what auto comes to anyway"
    before = build_config(BASE).model_dump(mode="json")
    del before["routing"], before["correction"]
    with pytest.raises(ConfigError, match=r"(?s)routing.replay: 'off' -> 'engine'.*correction.mode: 'off' -> 'truncate'"):
        changed(moe=True, before=before)
    assert changed(moe=True, before=before, routing={"replay": "off"}, correction={"mode": "off"}) == []


def test_every_listed_key_exists() -> None:
    keys = known_keys()
    assert not [entry for entry in (*FREE, *NEVER) if not any(key == entry or key.startswith(f"{entry}.") for key in keys)]
