"""What cannot run says so, names the key, and leaves no trace: before process groups, engines or models exist."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_world import World, configuration, launch, make_world, train, write, write_tokenizer

from megatron_antisd.config import load_config
from megatron_antisd.run import SETUP_ERRORS, build_run

Raw = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("bad"))


def copy_of(world: World, directory: Path) -> Path:
    return Path(shutil.copytree(world.checkpoint, directory / "model"))


def no_chat_template(world: World, directory: Path) -> Raw:
    model = copy_of(world, directory)
    (model / "chat_template.jinja").unlink()
    write_tokenizer(model, chat_template=None)
    return {"model": {"path": str(model)}}


def no_end_token(world: World, directory: Path) -> Raw:
    model = copy_of(world, directory)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "generation_config.json").unlink()
    return {"model": {"path": str(model)}}


def broken_config(world: World, directory: Path) -> Raw:
    model = copy_of(world, directory)
    (model / "config.json").write_text('{"model_type": ')
    return {"model": {"path": str(model)}}


def another_family(world: World, directory: Path) -> Raw:
    model = copy_of(world, directory)
    hf = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**hf, "model_type": "llama"}))
    return {"model": {"path": str(model)}}


def long_prompt(world: World, directory: Path) -> Raw:
    """200 words, 256 tokens of context, 64 of them for the response."""
    rows = world.train.read_text().splitlines()
    rows.insert(20, json.dumps({"id": "the-long-one", "problem": "add " * 200, "answer": "0"}))
    (directory / "long.jsonl").write_text("\n".join(rows) + "\n")
    return {"data": {"train": [str(directory / "long.jsonl")]}, "rollout": {"max_new_tokens": 64}}


def long_benchmark_prompt(world: World, directory: Path) -> Raw:
    long_prompt(world, directory)
    return {"evaluation": {"benchmarks": [{"name": "b", "path": str(directory / "long.jsonl")}], "max_new_tokens": 64}}


def bad_row(world: World, directory: Path) -> Raw:
    (directory / "bad.jsonl").write_text('{"problem": "add 1 1", "answer": "2"}\n{"problem": "add 1 2"}\n')
    return {"data": {"train": [str(directory / "bad.jsonl")]}}


def another_tokenizer(world: World, directory: Path) -> Raw:
    """A vocabulary of 20 in the model; the tokenizer has more."""
    shutil.copytree(world.checkpoint, directory / "model")
    config = json.loads((directory / "model/config.json").read_text())
    (directory / "model/config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    return {"model": {"path": str(directory / "model")}}


# name -> (what is wrong, ranks, parts of the message)
CASES: dict[str, tuple[Raw | Callable[[World, Path], Raw], int, tuple[str, ...]]] = {
    "unknown key": ({"rollout": {"grup_size": 8}}, 1, ("unknown key 'rollout.grup_size'", "'rollout.group_size'")),
    "group of one": ({"rollout": {"group_size": 1}}, 1, ("rollout.group_size", "greater than or equal to 2")),
    "wrong layout": ({"parallel": {"tensor_parallel_size": 2}}, 3, ("world size 3", "parallel.tensor_parallel_size=2")),
    "heads": ({"parallel": {"tensor_parallel_size": 4}}, 4, ("num_key_value_heads=2", "parallel.tensor_parallel_size=4")),
    "experts": ({"parallel": {"expert_parallel_size": 3}}, 3, ("num_experts=4", "parallel.expert_parallel_size=3")),
    "batch": ({"rollout": {"problems_per_step": 3, "group_size": 5}}, 2, ("rollout.problems_per_step=3", "data-parallel size 2")),
    "no model": ({"model": {"path": "nowhere"}}, 1, ("model.path", "nowhere")),
    "no benchmark": ({"evaluation": {"benchmarks": [{"name": "b", "path": "gone.jsonl"}]}}, 1, ("evaluation.benchmarks[0].path (b)", "gone.jsonl")),
    "no data": ({"data": {"train": ["gone.jsonl"]}}, 1, ("data.train[0]", "gone.jsonl")),
    "no rollouts": ({"debug": {"load_rollouts": "gone"}}, 1, ("debug.load_rollouts", "gone")),
    "context": ({"rollout": {"max_context": 1024}}, 1, ("rollout.max_context=1024", "max_position_embeddings=512")),
    "response": ({"rollout": {"max_new_tokens": 256}}, 1, ("rollout.max_new_tokens=256", "rollout.max_context=256")),
    "problems": ({"rollout": {"problems_per_step": 25}}, 1, ("rollout.problems_per_step", "24")),
    "grader": ({"grading": {"function": "tiny_world:no_such_function"}}, 1, ("grading.function", "no_such_function")),
    "template": ({"privileged": {"template": "{problem} {solution}"}}, 1, ("privileged.template must hold {feedback} exactly once",)),
    "chat argument": ({"data": {"chat_template_kwargs": {"enable_thinkin": False}}}, 1, ("data.chat_template_kwargs.enable_thinkin",)),
    "te": ({"optimizer": {"backend": "te"}}, 1, ("optimizer.backend=te", "not installed")),
    "no chat template": (no_chat_template, 1, ("has no chat template", "chat_template.jinja")),
    "no end token": (no_end_token, 1, ("model.path", "eos_token")),
    "broken config.json": (broken_config, 1, ("model.path", "config.json is not valid JSON")),
    "another family": (another_family, 1, ("model.path", "model_type 'llama' is not supported")),
    "another tokenizer": (another_tokenizer, 1, ("the tokenizer in", "vocab_size is 20")),
    "long prompt": (long_prompt, 1, ("'the-long-one'", "rollout.max_new_tokens=64", "1 of 25 problems")),
    "long benchmark prompt": (long_benchmark_prompt, 1, ("'the-long-one'", "evaluation.max_new_tokens=64")),
    "bad row": (bad_row, 1, ("bad.jsonl, line 2", "`answer` is missing")),
}


@pytest.mark.parametrize("name", list(CASES))
def test_refused_before_anything_starts(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wrong, ranks, parts = CASES[name]
    sections = wrong(world, tmp_path) if callable(wrong) else wrong
    # The in-process engine: what vLLM minds in addition is not the point here, and nothing of either must start.
    rollout = {"engine": "megatron", **sections.get("rollout", {})}
    raw = configuration(world, tmp_path / "run", **{**sections, "rollout": rollout})
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    started = time.monotonic()
    with pytest.raises(SETUP_ERRORS) as caught:
        build_run(load_config(write(raw, tmp_path / "config.yaml")))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert not dist.is_initialized() and not (tmp_path / "run").exists()
    assert time.monotonic() - started < 30  # measured 0.1 s, and 1 s where a grading worker starts first


def test_every_broken_rule_is_listed_at_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = configuration(world, tmp_path / "run", parallel={"tensor_parallel_size": 4}, data={"train": ["gone.jsonl"]},
                        optimizer={"backend": "apex"})
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SETUP_ERRORS, match=r"(?s)data\.train\[0\].*optimizer\.backend=apex.*parallel\.tensor_parallel_size=4"):
        build_run(load_config(write(raw, tmp_path / "config.yaml")))


def test_the_program_ends_with_one_message_and_a_code(world: World, tmp_path: Path) -> None:
    config = write(configuration(world, tmp_path / "run"), tmp_path / "config.yaml")
    done = launch(1, "-m", "megatron_antisd.train", config, "rollout.grup_size=8")
    assert done.returncode != 0
    assert "configuration error: the configuration has problems:\n  unknown key 'rollout.grup_size'" in done.stdout
    assert 'train.py", line' not in done.stdout, "a message, not a traceback"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_checkpoints_of_another_model_are_refused_and_kept(world: World, tmp_path: Path) -> None:
    """On resume, and where the weights on disk are not those that config.json speaks of. The earlier run's files stay as they are."""
    directory = tmp_path / "run"
    raw = configuration(world, directory, run={"steps": 1}, rollout={"engine": "megatron"}, checkpoint={"every": 1})
    train(1, write(raw, tmp_path / "config.yaml"))
    kept = contents(directory)
    other = make_world(tmp_path / "other", moe_intermediate_size=32)
    done = launch(1, "-m", "megatron_antisd.train", tmp_path / "config.yaml", f"model.path={other.checkpoint}", "run.steps=2")
    assert done.returncode != 0
    assert "is a checkpoint of another model than model.path describes" in done.stdout
    assert "moe_intermediate_size: 48 in the checkpoint, 32 here" in done.stdout
    assert contents(directory) == kept
    shutil.copy(other.checkpoint / "model.safetensors", world.checkpoint / "model.safetensors")
    done = launch(1, "-m", "megatron_antisd.train", tmp_path / "config.yaml", "checkpoint.resume=false")
    assert done.returncode != 0 and "are not those of the model that its config.json describes" in done.stdout
    assert contents(directory) == kept


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the lock, in which a run that is refused later has left its name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.slow
def test_evaluating_a_run_leaves_its_files_alone(tmp_path: Path) -> None:
    """`evaluate` scores the newest checkpoint into a folder of its own; without a benchmark it says so."""
    world, directory = make_world(tmp_path / "world"), tmp_path / "run"
    benchmark = [{"name": "held-out", "path": str(world.benchmark), "samples": 2}]
    raw = configuration(world, directory, run={"steps": 2}, rollout={"engine": "megatron"}, checkpoint={"every": 1},
                        evaluation={"every": 2, "benchmarks": benchmark})
    config = write(raw, tmp_path / "config.yaml")
    train(1, config)
    kept = contents(directory)
    done = launch(1, "-m", "megatron_antisd.evaluate", config)
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (directory / "evaluation" / "metrics.jsonl").read_text().splitlines()]
    during = [json.loads(line) for line in kept["metrics.jsonl"].splitlines()]
    assert rows == [row for row in during if row["step"] == 2 and "eval/held-out/avg@2" in row], "the same draws from the same policy"
    assert {name: data for name, data in contents(directory).items() if not name.startswith("evaluation/")} == kept
    done = launch(1, "-m", "megatron_antisd.evaluate", config, "evaluation.benchmarks=[]")
    assert done.returncode != 0 and "evaluation.benchmarks is empty" in done.stdout
