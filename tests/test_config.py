"""The configuration: reading, merging, refusing; and every rule between configuration, model, ranks and machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from megatron_antisd.config import ConfigError, RunConfig, Section, build_config, dump_config, known_keys, load_config
from megatron_antisd.config.rollout_rules import rollout_problems
from megatron_antisd.config.rules import check, check_files, check_layout, data_parallel_size, max_context

MINIMAL = {"model": {"path": "model"}, "data": {"train": ["train.jsonl"]}}

MOE = {
    "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "num_experts": 8, "moe_intermediate_size": 48,
    "norm_topk_prob": True, "vocab_size": 512,
}  # fmt: skip
DENSE = {**{k: v for k, v in MOE.items() if k not in ("num_experts", "moe_intermediate_size")}, "model_type": "qwen3"}

OLMO3 = {  # without the keys that published configs leave out
    "model_type": "olmo3", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512, "vocab_size": 512, "sliding_window": 8, "rope_scaling": {"rope_type": "yarn", "factor": 8.0},
}  # fmt: skip

# Fits MOE on 2 ranks and more.
FITTING = {**MINIMAL, "rollout": {"problems_per_step": 8, "group_size": 8, "max_new_tokens": 64, "max_context": 256}}

SELF_EXPLANATORY = {
    "optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "optimizer.eps", "privileged.correct", "privileged.incorrect",
    "data.system_prompt", "data.shuffle", "rollout.problems_per_step", "rollout.max_new_tokens", "rollout.temperature",
    "rollout.top_p", "grading.workers", "evaluation.every", "evaluation.benchmarks", "evaluation.temperature", "evaluation.top_p",
    "checkpoint.keep", "logging.tensorboard", "logging.wandb_project", "logging.progress", "run.name", "run.steps", "run.seed",
    "rollout.engine", "algorithm.method", "algorithm.lambda_max",
}  # fmt: skip


def configure(*overrides: str, raw: dict[str, Any] = FITTING) -> RunConfig:
    """A configuration from `raw` and `section.key=value` overrides, without a file."""
    merged = {section: dict(values) for section, values in raw.items()}
    for text in overrides:
        key, _, value = text.partition("=")
        section, leaf = key.split(".")
        merged.setdefault(section, {})[leaf] = yaml.safe_load(value)
    return build_config(merged)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# --- reading ---


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = build_config({
        **FITTING,
        "optimizer": {"lr": 3e-7, "betas": [0.9, 0.95]},
        "evaluation": {"benchmarks": [{"name": "aime", "path": "a.jsonl", "samples": 4}, {"name": "math", "path": "m.jsonl"}]},
        "data": {"train": ["a.jsonl", "b.parquet"], "chat_template_kwargs": {"enable_thinking": False}, "system_prompt": "say: 1"},
        "privileged": {"correct": "yes: \"so\"\n# not a comment"},
    })
    assert load_config(write(tmp_path / "run.yaml", dump_config(config))) == config


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", MINIMAL)
    config = load_config(path, [
        "optimizer.lr=1e-6", "rollout.temperature=0.8", "checkpoint.resume=false", "rollout.max_context=null",
        "data.train=[x.jsonl, y.jsonl]", "optimizer.betas=[0.9, 0.95]", "model.path=a=b", "rollout.group_size=4",
    ])  # fmt: skip
    assert config.optimizer.lr == 1e-6 and config.rollout.temperature == 0.8 and config.rollout.group_size == 4
    assert config.checkpoint.resume is False and config.rollout.max_context is None
    assert config.data.train == ("x.jsonl", "y.jsonl") and config.optimizer.betas == (0.9, 0.95)
    assert config.model.path == "a=b"


def test_a_later_override_wins_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", MINIMAL)
    before = path.read_text()
    assert load_config(path, ["run.steps=3", "run.steps=5"]).run.steps == 5
    assert path.read_text() == before


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "model.path.deeper=3"])
def test_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path / "run.yaml", MINIMAL), [override])


def test_base_is_merged_underneath_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    write(tmp_path / "common/root.yaml", {**MINIMAL, "optimizer": {"lr": 1e-5, "eps": 1e-7}, "run": {"steps": 10}})
    write(tmp_path / "common/middle.yaml", {"base": "root.yaml", "optimizer": {"lr": 2e-5}, "data": {"train": ["c.jsonl"]}})
    top = write(tmp_path / "top.yaml", {"base": "common/middle.yaml", "run": {"name": "top"}})
    config = load_config(top, ["optimizer.weight_decay=0.5"])
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (2e-5, 1e-7, 0.5)
    assert (config.run.steps, config.run.name) == (10, "top")
    assert config.data.train == ("c.jsonl",), "a list is replaced, not appended to"


@pytest.mark.parametrize(("content", "message"), [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "holds a list")])
def test_unreadable_file_is_explained(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "run.yaml", content))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file at .*absent.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="no configuration file at .*other.yaml"):
        load_config(write(tmp_path / "run.yaml", {"base": "other.yaml", **MINIMAL}))


# --- refusing ---


@pytest.mark.parametrize(("given", "nearest"), [
    ("rollout.group_sizes", "rollout.group_size"),
    ("optimizer.learning_rate", None),
    ("optimiser", "optimizer"),
    ("rollout.micro_batch_tokens", "trainer.micro_batch_tokens"),
    ("algorithm.lambda", "algorithm.lambda_max"),
])  # fmt: skip
def test_unknown_key_names_the_nearest(given: str, nearest: str | None) -> None:
    section, _, leaf = given.partition(".")
    raw = {**MINIMAL, section: {**MINIMAL.get(section, {}), leaf: 1} if leaf else {"lr": 1}}
    with pytest.raises(ConfigError) as caught:
        build_config(raw)
    assert f"unknown key '{given}'; the nearest valid key is" in str(caught.value)
    if nearest:
        assert f"'{nearest}'" in str(caught.value)


def test_every_problem_is_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"model": {}, "data": {"train": "x.jsonl"}, "rollout": {"group_size": 1, "top_k": 3}})
    message = str(caught.value)
    for part in ("model.path is required", "data.train", "rollout.group_size", "got 1", "unknown key 'rollout.top_k'"):
        assert part in message, message


@pytest.mark.parametrize(("overrides", "parts"), [
    (["privileged.template='{problem} {solution}'"], ["privileged.template must hold {feedback} exactly once", "0 times"]),
    (["data.prompt_template='{problem}{problem}'"], ["data.prompt_template must hold {problem} exactly once", "2 times"]),
    (["algorithm.shadow=true"], ["algorithm.shadow needs algorithm.method=grpo", "antisd"]),
    (["algorithm.compose=multiplicative", "algorithm.method=sd"], ["multiplicative needs algorithm.method=antisd", "sd"]),
    (["evaluation.benchmarks=[{name: a, path: x}, {name: a, path: y}]"], ["evaluation.benchmarks: names must differ"]),
    (["algorithm.updates_per_batch=3"], ["rollout.problems_per_step=8", "algorithm.updates_per_batch=3"]),
    (["model.dtype=float16"], ["model.dtype", "'float16'"]),
    (["rollout.top_p=1.5"], ["rollout.top_p", "1.5"]),
])  # fmt: skip
def test_rules_within_the_configuration(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(*overrides)
    for part in parts:
        assert part in str(caught.value)


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configure().run.steps = 3


def test_needs_teacher() -> None:
    assert configure().needs_teacher
    assert not configure("algorithm.method=grpo").needs_teacher
    assert configure("algorithm.method=grpo", "algorithm.shadow=true").needs_teacher


def _sections(section: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel]]]:
    found = [(prefix, section)]
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _sections(field.annotation, f"{prefix}{name}.")
    return found


def test_every_key_is_documented_or_says_itself() -> None:
    keys = known_keys()
    assert SELF_EXPLANATORY <= set(keys), sorted(SELF_EXPLANATORY - set(keys))
    undocumented = {prefix + name for prefix, section in _sections(RunConfig) for name, field in section.model_fields.items()
                    if prefix + name in keys and field.description is None}
    assert undocumented <= SELF_EXPLANATORY, sorted(undocumented - SELF_EXPLANATORY)
    assert all(issubclass(section, Section) for _, section in _sections(RunConfig))


# --- layout ---


@pytest.mark.parametrize(("overrides", "model", "world"), [
    ([], MOE, 1),
    (["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"], MOE, 2),
    (["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "parallel.expert_tensor_parallel_size=2",
      "rollout.tensor_parallel_size=4"], MOE, 4),  # fmt: skip
    (["parallel.pipeline_parallel_size=4"], DENSE, 4),
    (["parallel.pipeline_parallel_size=2", "parallel.tensor_parallel_size=2"], OLMO3, 4),
    (["model.recompute=selective", "model.recompute_modules=[attention,mlp,norms]", "model.grouped_experts=grouped"], MOE, 1),
    (["model.recompute=selective", "parallel.overlap_gradients=true", "optimizer.offload=true"], OLMO3, 2),
    (["model.grouped_experts=grouped", "parallel.expert_tensor_parallel_size=4", "model.dtype=float32"], MOE, 4),
    (["trainer.micro_batch_tokens=16"], DENSE, 2),  # below the context: a longer sequence is its own micro-batch
    (["rollout.max_context=512"], {**MOE, "vocab_size": 509}, 2),  # the vocabulary is padded: it has no rule
    ([], {**{k: v for k, v in MOE.items() if k != "num_experts"}, "num_local_experts": 8}, 2),  # as transformers 5 writes it
])  # fmt: skip
def test_layouts_that_fit(overrides: list[str], model: dict[str, Any], world: int) -> None:
    check_layout(configure(*overrides), model, world, cpu=True)


TP, PP, CP = "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size", "parallel.context_parallel_size"
VPP, LAYERS = "parallel.virtual_pipeline_size", "parallel.pipeline_layers"
EP, ETP = "parallel.expert_parallel_size", "parallel.expert_tensor_parallel_size"

BROKEN = {
    "world not a multiple of TP*PP": ([f"{TP}=2", f"{PP}=2"], MOE, 6, [f"world size 6 must be divisible by {TP}=2", "= 4"]),
    "world smaller than TP": ([f"{TP}=4"], DENSE, 2, [f"world size 2 must be divisible by {TP}=4"]),
    "world not a multiple of ETP*EP*PP": ([f"{EP}=4"], MOE, 2, ["world size 2", "expert_parallel_size=4", "= 4"]),
    "world not a multiple of TP*CP": ([f"{TP}=2", f"{CP}=2"], MOE, 2, ["world size 2 must be divisible", "context_parallel_size=2 = 4"]),
    "virtual stages without stages": ([f"{VPP}=2"], MOE, 1, [f"{VPP}=2 needs parallel.pipeline_parallel_size above 1"]),
    "engine replicas": (["rollout.tensor_parallel_size=2"], MOE, 3, ["world size 3", "rollout.tensor_parallel_size=2"]),
    "rollouts over replicas": (["rollout.problems_per_step=3", "rollout.group_size=3"], MOE, 2,
                               ["rollout.problems_per_step=3 * group_size=3", "= 9 rollouts", "data-parallel size 2"]),
    "rollouts of one update over replicas": (["algorithm.updates_per_batch=8"], MOE, 16,
                                             ["algorithm.updates_per_batch=8 = 8 rollouts", "data-parallel size 16"]),
    "attention heads": ([f"{TP}=3"], MOE, 3, [f"num_attention_heads=4, must be divisible by {TP}=3"]),
    "a chunk of the output layer below one token": (["trainer.vocab_chunk_bytes=1023"], MOE, 2,
                                                    ["trainer.vocab_chunk_bytes=1023 is too small", "vocab_size=512", "= 2048 bytes"]),
    "key/value heads": ([f"{TP}=4"], MOE, 4, [f"num_key_value_heads=2, must be divisible by {TP}=4"]),
    "hidden size": ([f"{TP}=2"], {**MOE, "hidden_size": 63}, 2, [f"hidden_size=63, must be divisible by {TP}=2"]),
    "feed-forward width": ([f"{TP}=2"], {**DENSE, "intermediate_size": 129}, 2, [f"intermediate_size=129, must be divisible by {TP}=2"]),
    "grouped heads": ([], {**DENSE, "num_key_value_heads": 3}, 1, ["num_attention_heads=4", "num_key_value_heads=3"]),
    "layers": ([f"{PP}=5"], MOE, 5, [f"num_hidden_layers=4, are fewer than {PP}=5"]),
    "layers of virtual stages": ([f"{PP}=2", f"{VPP}=3"], MOE, 2, ["num_hidden_layers=4, are fewer than", "virtual_pipeline_size=3 = 6"]),
    "layers that do not sum": ([f"{PP}=2", f"{LAYERS}=[1,2]"], MOE, 2, [f"{LAYERS}=[1, 2] must name 2 numbers", "names 2 with the sum 3"]),
    "too many stages": ([f"{PP}=2", f"{LAYERS}=[1,2,1]"], MOE, 2, [f"{LAYERS}=[1, 2, 1] must name 2 numbers", "num_hidden_layers=4"]),
    "a stage without layers": ([f"{PP}=2", f"{LAYERS}=[0,4]"], MOE, 2, [f"{LAYERS}=[0, 4] must name 2 numbers of at least 1"]),
    "experts": ([f"{EP}=3"], MOE, 3, [f"num_experts=8, must be divisible by {EP}=3"]),
    "expert width": ([f"{ETP}=5"], MOE, 5, [f"moe_intermediate_size=48, must be divisible by {ETP}=5"]),
    "experts of a dense model": ([f"{EP}=2", f"{ETP}=2"], DENSE, 4, [f"{EP}=2 needs a mixture-of-experts", f"{ETP}=2 needs", "'qwen3'"]),
    "recomputed parts without selective recompute": (["model.recompute=full", "model.recompute_modules=[mlp]"], MOE, 1,
                                                     ["model.recompute_modules=['mlp'] needs model.recompute=selective, got full"]),
    "norms of an OLMo-3": (["model.recompute=selective", "model.recompute_modules=[norms]"], OLMO3, 1, ["norms has no effect on an olmo3"]),
    "buckets without overlap": (["parallel.gradient_bucket_parameters=1000"], MOE, 1,
                                ["parallel.gradient_bucket_parameters=1000 needs parallel.overlap_gradients=true"]),
    "offload of a fused optimizer": (["optimizer.offload=true", "optimizer.backend=te"], MOE, 1,
                                     ["optimizer.offload=true needs optimizer.backend=torch, got te"]),
    "grouped experts of transformer-engine": (["model.grouped_experts=sequential", "model.spec=te"], MOE, 1,
                                              ["model.grouped_experts=sequential needs model.spec=local, got te"]),
    "experts' form of a dense model": (["model.grouped_experts=grouped"], DENSE, 1,
                                       ["model.grouped_experts=grouped needs a mixture-of-experts model"]),
    "norms of transformer-engine": (["model.spec=te", "model.recompute=selective", "model.recompute_modules=[norms]"], MOE, 1,
                                    ["norms needs model.spec=local, got te"]),
    "grouped experts' width": (["model.grouped_experts=grouped", f"{ETP}=4"], MOE, 4,
                               [f"moe_intermediate_size / {ETP}=4 to be a multiple of 8 in bfloat16, got 12"]),
    "attention bias": ([], {**DENSE, "attention_bias": True}, 1, ["attention_bias=true is not supported for qwen3"]),
    "sliding window": ([], {**DENSE, "use_sliding_window": True}, 1, ["use_sliding_window=true"]),
    "rope": ([], {**DENSE, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 1,
             ["rope type 'dynamic' (one of default, linear, yarn, llama3 is)"]),
    "rope of transformers 5": ([], {**DENSE, "rope_parameters": {"rope_type": "longrope"}}, 1, ["rope type 'longrope'"]),
    "rope of a kind of layer": ([], {**OLMO3, "rope_parameters": {"full_attention": {"rope_type": "su"}}}, 1,
                                ["rope type 'su'", "not supported for olmo3"]),
    "sparse and dense layers": ([], {**MOE, "mlp_only_layers": [1], "decoder_sparse_step": 2}, 1, ["mlp_only_layers", "decoder_sparse_step"]),
    "router weights": ([], {**MOE, "norm_topk_prob": False}, 1, ["norm_topk_prob=false"]),
    "model type": ([], {**DENSE, "model_type": "llama"}, 1, ["'llama' is not supported", "qwen3, qwen3_moe, olmo3"]),
    "keys of an OLMo-3": ([], {"model_type": "olmo3", "hidden_size": 8}, 1, ["lacks intermediate_size", "num_attention_heads", "head_dim"]),
    "keys of the model": ([], {"model_type": "qwen3_moe", "hidden_size": 8}, 1, ["lacks intermediate_size", "head_dim", "num_experts"]),
    "response fills the context": (["rollout.max_new_tokens=256"], MOE, 1,
                                   ["rollout.max_new_tokens=256 must be less than rollout.max_context=256"]),
    "response fills the model": (["rollout.max_context=null", "rollout.max_new_tokens=512"], MOE, 1,
                                 ["rollout.max_new_tokens=512 must be less than the model's max_position_embeddings=512"]),
    "evaluation's response": (["evaluation.max_new_tokens=300"], MOE, 1, ["evaluation.max_new_tokens=300", "rollout.max_context=256"]),
    "context beyond the model": (["rollout.max_context=513"], MOE, 1, ["rollout.max_context=513", "max_position_embeddings=512"]),
    "engine heads": (["rollout.tensor_parallel_size=3"], DENSE, 3, ["num_attention_heads=4", "rollout.tensor_parallel_size=3"]),
    "engine key/value heads": (["rollout.tensor_parallel_size=6"], {**DENSE, "num_attention_heads": 12, "num_key_value_heads": 4}, 6,
                               ["num_key_value_heads=4 must be a multiple or a divisor of rollout.tensor_parallel_size=6"]),
    "engine expert width": (["rollout.tensor_parallel_size=4"], {**MOE, "moe_intermediate_size": 50}, 4,
                            ["moe_intermediate_size=50", "rollout.tensor_parallel_size=4"]),
    "engine experts": (["rollout.tensor_parallel_size=4"], {**MOE, "num_experts": 2}, 4,
                       ["rollout.tensor_parallel_size=4 must not exceed the model's num_experts=2"]),
    "head size on CPU": ([], {**DENSE, "head_dim": 16}, 1, ["head_dim=16", "32, 64", "rollout.engine=megatron"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_layout_is_explained(name: str) -> None:
    overrides, model, world, parts = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        check_layout(configure(*overrides), model, world, cpu=True)
    for part in parts:
        assert part in str(caught.value)


def test_all_broken_rules_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        check_layout(configure(f"{TP}=3", f"{EP}=3", f"{VPP}=2", "rollout.max_context=1000"), MOE, 4)
    lines = str(caught.value).splitlines()[1:]
    for part in ("world size 4", VPP, "num_attention_heads=4", "num_experts=8", "rollout.max_context=1000"):
        assert sum(part in line for line in lines) >= 1, lines
    assert len(lines) == len(set(lines))


def test_engine_rules_are_for_vllm_only() -> None:
    check_layout(configure("rollout.engine=megatron", "rollout.tensor_parallel_size=3"), {**DENSE, "head_dim": 16}, 2, cpu=True)
    check_layout(configure(), {**DENSE, "head_dim": 16}, 2)  # a GPU: vLLM's own kernels decide


def test_data_parallel_size_and_context() -> None:
    config = configure(f"{TP}=2", f"{PP}=2")
    assert data_parallel_size(config, 8) == 2
    with pytest.raises(ConfigError, match="world size 6"):
        data_parallel_size(config, 6)
    assert max_context(config, MOE) == 256
    assert max_context(configure("rollout.max_context=null"), MOE) == 512


@pytest.mark.parametrize(("overrides", "layers", "chunks"), [
    ([f"{PP}=2"], 4, (2, 2)), ([f"{PP}=4"], 6, (2, 2, 1, 1)), ([f"{PP}=2", f"{VPP}=2"], 5, (2, 1, 1, 1)),
    ([f"{PP}=2", f"{LAYERS}=[3,1]"], 4, (3, 1)), ([], 4, (4,))])
def test_layers_of_pipeline_stages(overrides: list[str], layers: int, chunks: tuple[int, ...]) -> None:
    assert configure(*overrides).parallel.chunk_layers(layers) == chunks


# --- files and packages ---


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MOE))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (tmp_path / "train.jsonl").write_text("")
    return folder


def on_disk(checkpoint: Path, *overrides: str) -> RunConfig:
    return configure(f"model.path={checkpoint}", f"data.train=[{checkpoint.parent / 'train.jsonl'}]", "rollout.engine=megatron",
                     *overrides)  # fmt: skip


def test_complete_files_pass(checkpoint: Path) -> None:
    check_files(on_disk(checkpoint))
    check(on_disk(checkpoint), MOE, 2)


@pytest.mark.parametrize(("name", "message"), [
    ("config.json", "no config.json in"), ("tokenizer.json", "no tokenizer in"), ("model.safetensors", "no weights in"),
])  # fmt: skip
def test_incomplete_checkpoint_is_named(checkpoint: Path, name: str, message: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ConfigError, match=message):
        check_files(on_disk(checkpoint))


def test_a_checkpoint_has_weights_of_another_kind(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "manifest.json")
    check_files(on_disk(checkpoint))


def test_broken_config_json_is_named(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is not valid JSON"):
        check_files(on_disk(checkpoint))


@pytest.mark.parametrize(("override", "parts"), [
    ("model.path=nowhere", ["model.path: no directory at nowhere"]),
    ("data.train=[nowhere.jsonl]", ["data.train[0]: no file at nowhere.jsonl"]),
    ("evaluation.benchmarks=[{name: aime, path: nowhere.jsonl}]", ["evaluation.benchmarks[0].path (aime): no file at nowhere.jsonl"]),
    ("checkpoint.continual_from=nowhere", ["checkpoint.continual_from: no directory at nowhere"]),
    ("debug.load_rollouts=nowhere", ["debug.load_rollouts: no directory at nowhere"]),
    ("grading.function=json.loads", ["grading.function='json.loads'", "package.module:function"]),
    ("grading.function='absent_package.x:f'", ["no package 'absent_package'"]),
    ("logging.token_kinds='absent_package.x:f'", ["logging.token_kinds", "no package 'absent_package'"]),
])  # fmt: skip
def test_missing_thing_is_named(checkpoint: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_files(on_disk(checkpoint, override))
    for part in parts:
        assert part in str(caught.value)


def test_absent_packages_are_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the folder with a package like the index's unrelated `apex` is on the path: no NVIDIA apex, no TE, no vLLM.
    unrelated = checkpoint.parent / "site"
    (unrelated / "apex").mkdir(parents=True)
    (unrelated / "apex/__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr("sys.path", [str(unrelated)])
    monkeypatch.setattr("sys.modules", {k: v for k, v in __import__("sys").modules.items()
                                        if k not in ("vllm", "transformer_engine", "apex", "wandb")})  # fmt: skip
    for overrides, part in [
        (["rollout.engine=vllm"], "rollout.engine=vllm: vLLM is not installed"),
        (["optimizer.backend=te"], "optimizer.backend=te: transformer-engine is not installed"),
        (["model.spec=te"], "model.spec=te: transformer-engine is not installed"),
        (["optimizer.backend=apex"], "NVIDIA's apex is not installed"),
        (["logging.wandb_project=p"], "wandb is not installed"),
    ]:
        with pytest.raises(ConfigError) as caught:
            check_files(on_disk(checkpoint, *overrides))
        assert part in str(caught.value)
    (unrelated / "apex/optimizers").mkdir()
    check_files(on_disk(checkpoint, "optimizer.backend=apex"))


def test_files_and_layout_come_in_one_message(checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(on_disk(checkpoint, "data.train=[nowhere.jsonl]", f"{VPP}=2"), MOE, 2)
    assert "data.train[0]" in str(caught.value) and VPP in str(caught.value)


@pytest.mark.parametrize(("sections", "message"), [
    ({"supervision": {"heartbeat_seconds": 60}}, "silence_seconds=120 must be more than two supervision.heartbeat_seconds=60"),
    ({"supervision": {"generate_seconds": 200}}, "rollout.stall_seconds=300 must be less than supervision.generate_seconds=200")])
def test_time_outs_that_would_come_in_the_wrong_order(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"model": {"path": "m"}, **sections})


def test_collectives_outlast_every_stage() -> None:
    config = build_config({"model": {"path": "m"}, "parallel": {"timeout_seconds": 600}})
    assert config.collective_seconds == config.supervision.evaluate_seconds + 60
    assert build_config({"model": {"path": "m"}, "parallel": {"timeout_seconds": 99999}}).collective_seconds == 99999


def test_a_bare_off_is_what_it_says(tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    (tmp_path / "run.yaml").write_text("model: {path: m}\ncorrection: {mode: off}\nrouting: {replay: off}\n")
    config = load_config(tmp_path / "run.yaml", ["tails.overlong=off"])
    assert (config.correction.mode, config.routing.replay, config.tails.overlong) == ("off",) * 3
    assert load_config(_written(tmp_path, dump_config(config))).correction.mode == "off"


def _written(directory: Path, text: str) -> Path:
    (directory / "dumped.yaml").write_text(text)
    return directory / "dumped.yaml"


def test_the_correction_is_on_where_the_engine_cannot_be_the_trainer() -> None:
    def mode(**sections: dict[str, object]) -> str:
        return build_config({"model": {"path": "m", "dtype": "float32"}, **sections}).correction_mode  # type: ignore[dict-item]

    assert mode() == "off" and mode(model={"path": "m", "dtype": "bfloat16"}) == "truncate"
    assert mode(asynchrony={"max_staleness": 1}) == "truncate"
    assert mode(model={"path": "m", "dtype": "bfloat16"}, correction={"mode": "off"}) == "off" and mode(correction={"mode": "mask"}) == "mask"


@pytest.mark.parametrize(("wanted", "oversample", "drawn"), [(32, 1.0, 32), (4, 1.5, 6), (3, 1.1, 4), (10, 1.1, 11), (1, 4.0, 4), (100, 1.1, 110)])
def test_oversampling_rounds_up_and_not_beyond(wanted: int, oversample: float, drawn: int) -> None:
    assert build_config({"model": {"path": "m"}, "tails": {"oversample": oversample}}).problems_drawn(wanted) == drawn


@pytest.mark.parametrize(("sections", "words"), [
    ({"correction": {"mode": "off", "level": "sequence"}}, "correction.level=sequence has no effect with correction.mode=off"),
    ({"correction": {"mode": "off", "upper": 3.0}}, "correction.upper=3.0 has no effect with correction.mode=off"),
    ({"correction": {"lower": 0.4}, "model": {"path": "m", "dtype": "float32"}}, "correction.lower=0.4 has no effect with correction.mode=auto"),
    ({"correction": {"mode": "truncate", "lower": 0.4}}, "correction.lower=0.4 has no effect where correction.mode comes to truncate"),
    ({"tails": {"dynamic_rounds": 2}}, "tails.dynamic_rounds=2 has no effect with tails.dynamic_sampling=false"),
    ({"tails": {"overlong": "mask", "overlong_buffer": 8}}, "tails.overlong_buffer=8 has no effect with tails.overlong=mask"),
    ({"tails": {"overlong_penalty": 0.5}}, "tails.overlong_penalty=0.5 has no effect with tails.overlong=off"),
    ({"tails": {"oversample": 1.0 + 1e-12}}, "starts no group more than rollout.problems_per_step=32; the least that does is 1.03"),
    ({"tails": {"overlong": "penalty", "overlong_buffer": 9000}}, "tails.overlong_buffer=9000 must not exceed rollout.max_new_tokens=8192"),
    ({"tails": {"overlong": "mask"}, "rollout": {"ignore_eos": True}}, "leaves nothing in the loss"),
    ({"tails": {"oversample": 1.5, "schedule": "longest_first"}, "asynchrony": {"max_staleness": 1}, "rollout": {"mode": "servers"}},
     "tails.oversample, tails.schedule cannot go with asynchrony.max_staleness=1"),
])
def test_tails_and_corrections_without_effect_are_refused(sections: dict[str, dict[str, object]], words: str) -> None:
    config = build_config({"model": {"path": "m"}, **sections})
    assert any(words in problem for problem in rollout_problems(config, moe=False)), list(rollout_problems(config, moe=False))


@pytest.mark.parametrize(("sections", "words"), [
    ({"rollout": {"mode": "servers", "engine": "megatron"}}, "rollout.mode=servers needs rollout.engine=vllm, got megatron"),
    ({"asynchrony": {"max_staleness": 1}}, "asynchrony.max_staleness=1 needs rollout.mode=servers, got colocated"),
    ({"asynchrony": {"max_staleness": 1}, "rollout": {"mode": "servers", "problems_per_step": 4}, "algorithm": {"updates_per_batch": 2}},
     "leaves no room to draw a step ahead: with algorithm.updates_per_batch=2 a step is 2 policy versions"),
    ({"asynchrony": {"replay": "runs/first"}}, "asynchrony.replay=runs/first has no effect with asynchrony.max_staleness=0"),
    ({"asynchrony": {"partial": "finish"}}, "asynchrony.partial=finish has no effect"),
    ({"servers": {"store": "10.0.0.1"}, "rollout": {"mode": "servers"}}, "servers.store='10.0.0.1' is not of the form HOST:PORT"),
    ({"sync": {"transport": "cuda_ipc"}}, "sync.transport=cuda_ipc has no effect with rollout.mode=colocated"),
])
def test_servers_and_staleness_that_cannot_be_are_refused(sections: dict[str, dict[str, object]], words: str) -> None:
    config = build_config({"model": {"path": "m"}, **sections})
    assert any(words in problem for problem in rollout_problems(config, moe=False)), list(rollout_problems(config, moe=False))
