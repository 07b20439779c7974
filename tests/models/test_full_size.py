"""Full-size models in large worlds, proved without weights: every Hugging Face tensor comes out of the shards exactly once, in its shape.

Shards are those of real Megatron modules on the meta device (`full_size_ranks.py`); the oracle is transformers' own model on the meta device.

Where the shapes come from:

* Qwen3-8B, Qwen3-30B-A3B, Qwen3-4B-Instruct-2507: their published config.json, read from ANTISD_DATA where that is set; written out below otherwise.
* OLMo-3 7B: transformers' `Olmo3Config()`. Its defaults are the model card's sizes (32 layers, 4096 wide, 32 query and 32 key/value heads, sliding
  windows of 4096) but for two: the card says 65 536 tokens of context, and the vocabulary is that of OLMo-core's `TokenizerConfig.dolma2`, 100 278
  entries, where the default is the first OLMo's 50 304.

Where the published parameter counts come from: the model cards of Qwen. OLMo 3's says 7B; its bfloat16 checkpoint has 14.6 GB, which makes 7.3 B.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_antisd.config import ParallelConfig
from megatron_antisd.models.build import describe

SCRIPT = Path(__file__).with_name("full_size_ranks.py")
SECONDS = 280  # for all simulated ranks; about 50 on two cores

QWEN3 = dict(model_type="qwen3", hidden_act="silu", head_dim=128, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=36,
             vocab_size=151936, rms_norm_eps=1e-6, rope_scaling=None, attention_bias=False, use_sliding_window=False, tie_word_embeddings=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    written: dict[str, Any]
    """config.json as far as shapes go."""
    file: str | None
    """The published one, in ANTISD_DATA."""
    billions: str
    """Published number of parameters."""
    without_embeddings: str | None = None
    """The same without embedding and output layer."""
    active: str | None = None
    """The same with `num_experts_per_tok` of each layer's experts, embedding and output layer included."""

    @property
    def config(self) -> dict[str, Any]:
        folder = os.environ.get("ANTISD_DATA")
        return json.loads((Path(folder) / self.file).read_text()) if folder and self.file else self.written


MODELS = {
    "qwen3-8b": Model(
        written=QWEN3 | dict(hidden_size=4096, intermediate_size=12288, rope_theta=1000000, max_position_embeddings=40960),
        file="configs/qwen3-8B_config.json", billions="8.2", without_embeddings="6.95"),
    "qwen3-4b": Model(
        written=QWEN3 | dict(hidden_size=2560, intermediate_size=9728, rope_theta=5000000, max_position_embeddings=262144, tie_word_embeddings=True),
        file="tokenizer/qwen3-4b-2507/config.json", billions="4.0", without_embeddings="3.6"),
    "olmo3-7b": Model(
        written=AutoConfig.for_model("olmo3", vocab_size=100278, max_position_embeddings=65536).to_dict(), file=None, billions="7.3"),
    "qwen3-30b-a3b": Model(
        written=QWEN3 | dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_key_value_heads=4, num_hidden_layers=48,
                             num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
                             mlp_only_layers=[], rope_theta=1000000.0, max_position_embeddings=40960),
        file="configs/qwen3-30B-A3B_config.json", billions="30.5", without_embeddings="29.9", active="3.3"),
}
DENSE, MOE = ("qwen3-8b", "qwen3-4b", "olmo3-7b"), ("qwen3-30b-a3b",)


@dataclass(frozen=True, kw_only=True)
class Layout:
    world: int = 64
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    single: int | None = None
    """The chunk that gets one layer only; the others share the rest evenly."""
    models: tuple[str, ...] = field(default=MOE, repr=False)

    @property
    def name(self) -> str:
        sizes = [f"{key}{value}" for key in ("tp", "pp", "vpp", "cp", "ep", "etp") if (value := getattr(self, key)) > 1]
        return "-".join([str(self.world), *sizes, *(["uneven"] if self.single is not None else [])])

    def parallel(self, layers: int) -> ParallelConfig:
        given = None
        if self.single is not None:
            rest = ParallelConfig(pipeline_parallel_size=self.pp * self.vpp - 1).chunk_layers(layers - 1)
            given = (*rest[: self.single], 1, *rest[self.single :])
        return ParallelConfig(
            tensor_parallel_size=self.tp, pipeline_parallel_size=self.pp, virtual_pipeline_size=self.vpp, context_parallel_size=self.cp,
            expert_parallel_size=self.ep, expert_tensor_parallel_size=self.etp, pipeline_layers=given)


def dense(**sizes: int) -> Layout:
    return Layout(models=DENSE, **sizes)


LAYOUTS = [
    dense(), dense(tp=2), dense(tp=4), dense(tp=8), dense(pp=2), dense(pp=4), dense(pp=8), dense(tp=2, pp=2), dense(tp=4, pp=4), dense(tp=8, pp=8),
    dense(tp=2, pp=4, single=0), dense(tp=4, pp=8, single=7), dense(pp=2, vpp=2), dense(tp=2, pp=4, vpp=2), dense(tp=4, pp=2, vpp=4),
    dense(tp=2, pp=4, vpp=2, single=3), dense(cp=8), dense(tp=2, cp=2), dense(tp=4, pp=2, cp=2), dense(tp=8, pp=2, cp=4),
    dense(world=128, tp=8, pp=4), dense(world=128, tp=4, pp=8, cp=2), dense(world=128, tp=2, pp=16), dense(world=128, tp=8, cp=16),
    # experts over all ranks, over some, over none; ETP as TP, below and above it
    Layout(ep=64), Layout(tp=4, ep=64), Layout(ep=32), Layout(tp=4, ep=16), Layout(tp=2, ep=8), Layout(tp=4, ep=8, etp=4), Layout(tp=4, ep=8, etp=2),
    Layout(ep=8, etp=2), Layout(tp=2, ep=16, etp=4), Layout(tp=2, pp=2, ep=8), Layout(tp=4, pp=4, ep=8, etp=2), Layout(tp=4, pp=8, ep=4),
    Layout(tp=2, pp=4, ep=16), Layout(pp=8, ep=8, single=0), Layout(tp=4, pp=4, ep=16, single=3), Layout(pp=4, vpp=2, ep=8),
    Layout(tp=4, pp=2, vpp=4, ep=8, etp=4), Layout(tp=2, pp=4, vpp=2, ep=8, single=5), Layout(tp=4, cp=2, ep=8), Layout(tp=2, cp=4, ep=16, etp=2),
    Layout(tp=2, pp=2, cp=2, ep=8, etp=4), Layout(tp=4, pp=4, ep=2, etp=4), Layout(tp=2, pp=8), Layout(tp=4, pp=4, etp=4),
    Layout(world=128, pp=2, ep=64), Layout(world=128, tp=4, pp=4, ep=16, etp=2), Layout(world=128, ep=32, etp=4),
    Layout(world=128, tp=4, pp=4, vpp=2, cp=4, ep=8, etp=2),
]
CASES = [pytest.param(name, layout, id=f"{name}-{layout.name}") for layout in LAYOUTS for name in layout.models]


@cache
def oracle(name: str) -> dict[str, tuple[int, ...]]:
    """Name on disk -> shape, by transformers. Tied output layers are not written, fused experts are written one by one."""
    config = MODELS[name].config
    fields = {key: value for key, value in config.items() if key not in ("architectures", "transformers_version", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    found = {}
    for key, tensor in model.state_dict().items():
        if not (config.get("tie_word_embeddings") and key == "lm_head.weight"):
            found |= dict(on_disk(key, tuple(tensor.shape)))
    return found


def on_disk(key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, fused, projection = key.partition(".experts.")
    if not fused:
        yield key, shape
        return
    experts, rows, columns = shape  # gate_up_proj [E, 2 F, H], down_proj [E, H, F]
    parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
    for expert in range(experts):
        for part in parts:
            yield f"{prefix}.experts.{expert}.{part}.weight", (rows // len(parts), columns)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the simulated ranks wrote. Dense and sparse models in a process each: they patch torch and Megatron."""
    root = tmp_path_factory.mktemp("full_size")
    for name, model in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(model.config))
    started = [start(root, kind) for kind in (DENSE, MOE)]
    try:
        for process in started:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output[-6000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return root


def start(root: Path, models: tuple[str, ...]) -> subprocess.Popen[str]:
    layers = {name: MODELS[name].config["num_hidden_layers"] for name in models}
    layouts = [{"name": layout.name, "world_size": layout.world, "models": {name: layout.parallel(layers[name]).model_dump() for name in models}}
               for layout in LAYOUTS if layout.models == models]
    plan = root / f"{models[0]}.plan.json"
    plan.write_text(json.dumps({"models": {name: str(root / name) for name in models}, "layouts": layouts}))
    # Without a GPU in sight: there Megatron would put its parameters on it, whatever the default device.
    return subprocess.Popen([sys.executable, str(SCRIPT), str(plan), str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_shards_make_every_tensor_once(simulated: Path, name: str, layout: Layout) -> None:
    result = json.loads((simulated / f"{name}--{layout.name}.json").read_text())
    names = [key for key, _ in result["tensors"]]
    assert len(set(names)) == len(names)
    assert {key: tuple(shape) for key, shape in result["tensors"]} == oracle(name)
    assert len(result["held"]) == layout.world and min(result["held"]) > 0
    assert result["merged"] == result["held"], "a parameter of some rank is in no shard group, or in two"
    assert result["replicas"] * layout.tp * layout.pp == layout.world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_chunks_hold_the_layers_that_the_config_says(simulated: Path, name: str, layout: Layout) -> None:
    """Chunk i of the model stands on stage i modulo PP, its layers behind those of chunk i - 1."""
    result = json.loads((simulated / f"{name}--{layout.name}.json").read_text())
    layers = MODELS[name].config["num_hidden_layers"]
    counts = layout.parallel(layers).chunk_layers(layers)
    assert [len(stage) for stage in result["layers"]] == [layout.vpp] * layout.pp
    in_order = [result["layers"][chunk % layout.pp][chunk // layout.pp] for chunk in range(layout.pp * layout.vpp)]
    assert [len(chunk) for chunk in in_order] == list(counts)
    assert [layer for chunk in in_order for layer in chunk] == list(range(layers))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_padded_vocabulary_comes_off_again(simulated: Path, tp: int) -> None:
    """100 278 rows do not divide by 4 or 8; Qwen3's 151 936 always do."""
    rows = {1: 100278, 2: 100278, 4: 100280, 8: 100280}[tp]
    result = json.loads((simulated / f"olmo3-7b--{dense(tp=tp).name}.json").read_text())
    assert result["vocabulary_rows"] == rows
    shapes = dict(result["tensors"])
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == [100278, 4096]
    result = json.loads((simulated / f"qwen3-8b--{dense(tp=tp).name}.json").read_text())
    assert result["vocabulary_rows"] == 151936


def is_published(count: int, billions: str) -> bool:
    """Model cards round (6.946 -> 6.95) or cut (3.353 -> 3.3)."""
    digits = len(billions.partition(".")[2])
    exact = count / 1e9
    return billions in (f"{exact:.{digits}f}", f"{math.floor(exact * 10**digits) / 10**digits:.{digits}f}")


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(tmp_path: Path, name: str) -> None:
    model = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(model.config))
    sizes = {key: math.prod(shape) for key, shape in oracle(name).items()}
    total = describe(tmp_path, 1).parameters()
    assert total == sum(sizes.values())
    assert is_published(total, model.billions)
    ends = sum(count for key, count in sizes.items() if key in ("model.embed_tokens.weight", "lm_head.weight"))
    if model.without_embeddings:
        assert is_published(total - ends, model.without_embeddings)
    if model.active:
        experts = sum(count for key, count in sizes.items() if ".experts." in key)
        idle = experts * (model.config["num_experts"] - model.config["num_experts_per_tok"]) // model.config["num_experts"]
        assert is_published(total - idle, model.active)


def test_other_counts_are_not_the_published_ones() -> None:
    """As a vocabulary of 50 304 would give, or one expert more."""
    assert is_published(6_946_000_000, "6.95") and is_published(3_353_000_000, "3.3") and is_published(8_190_000_000, "8.2")
    assert not is_published(6_888_000_000, "7.3") and not is_published(3_579_000_000, "3.3") and not is_published(6_939_000_000, "6.95")


@pytest.mark.skipif(not os.environ.get("ANTISD_DATA"), reason="ANTISD_DATA is not set: no published config.json to compare with")
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.file])
def test_shapes_written_out_here_are_the_published_ones(name: str) -> None:
    model = MODELS[name]
    published = model.config
    assert model.written == {key: published[key] for key in model.written}


def test_olmo3s_shape_is_the_model_cards() -> None:
    config = MODELS["olmo3-7b"].config
    card = dict(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, sliding_window=4096,
                max_position_embeddings=65536)
    assert {key: config[key] for key in card} == card
