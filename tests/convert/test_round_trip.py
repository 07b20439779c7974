"""Hugging Face -> Megatron -> Hugging Face changes nothing; what stands between is an ordinary checkpoint and a model directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from convert.models import BESIDE, NOT_COPIED, SMALL_BUCKET, assert_same, change, make, shard, tensors
from distributed import run_ranks
from torch.distributed.checkpoint import FileSystemReader

from megatron_antisd.config import ParallelConfig
from megatron_antisd.convert import workspace
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.to_huggingface import convert_to_huggingface
from megatron_antisd.convert.to_megatron import ToMegatron, convert_to_megatron
from megatron_antisd.models.description import describe
from megatron_antisd.models.weight_map import split

ROOT = Path(__file__).resolve().parents[2]
TP2, ETP2, TP4 = {"tensor_parallel_size": 2}, {"expert_tensor_parallel_size": 2}, {"tensor_parallel_size": 4}


def round_trip(source: Path, directory: Path, layout: dict[str, int], bucket: int = SMALL_BUCKET) -> tuple[Path, Path]:
    there = convert_to_megatron(source, directory / "megatron", ParallelConfig(**layout), verify=True, bucket_bytes=bucket)
    back = convert_to_huggingface(directory / "megatron", directory / "back", verify=True, bucket_bytes=bucket)
    assert there.compared == back.compared
    assert there.compared.tensors == len(tensors(source))
    assert there.compared.nbytes == sum(tensor.nbytes for tensor in tensors(source).values())
    return directory / "megatron", directory / "back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "layout"), [
    ("dense", {}), ("dense", TP2), ("tied", TP2), ("moe", {}), ("moe", TP2 | ETP2), ("moe", ETP2), ("moe", TP2 | {"expert_parallel_size": 4}),
    ("olmo3", TP2), ("olmo3", {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2, "context_parallel_size": 2})], ids=str)
def test_nothing_changes(tmp_path: Path, kind: str, layout: dict[str, int], dtype: torch.dtype) -> None:
    source = make(kind, tmp_path / "source", dtype)  # 61 words: no tensor-parallel size divides them
    between, back = round_trip(source, tmp_path, layout)
    assert_same(source, back)
    assert len(list(back.glob("*.safetensors"))) > 3
    for directory in (between, back):
        assert not [name for name in (*NOT_COPIED, "figures", "conversion") if (directory / name).exists()]
    assert not list(tmp_path.glob("*.incomplete"))


def test_every_tensor_keeps_its_own_dtype(tmp_path: Path) -> None:
    source = make("moe", tmp_path / "source", torch.bfloat16)
    router = tensors(source)["model.layers.1.mlp.gate.weight"].float()
    change(source, model__layers__1__mlp__gate__weight=router)
    shard(source, 3)
    between, back = round_trip(source, tmp_path, TP2)
    assert_same(source, back)
    assert json.loads((between / "manifest.json").read_text())["dtype"] is None


def test_values_that_compare_unequal_to_themselves(tmp_path: Path) -> None:
    source = make("dense", tmp_path / "source")
    norm = torch.full((64,), float("nan"))
    norm[::2] = -0.0
    change(source, model__norm__weight=norm)
    _, back = round_trip(source, tmp_path, {})
    assert torch.equal(tensors(back)["model.norm.weight"].view(torch.int32), norm.view(torch.int32))


def test_the_checkpoint_is_read_by_torch_alone(tmp_path: Path) -> None:
    """And is cut as the layout's ranks hold it: each rectangle belongs to one of them."""
    source = make("moe", tmp_path / "source", torch.bfloat16)
    convert_to_megatron(source, tmp_path / "megatron", ParallelConfig(**TP2, **ETP2), bucket_bytes=SMALL_BUCKET)
    reader = FileSystemReader(tmp_path / "megatron" / "tensors")
    stored = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in stored.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    description, given = describe(source, 1), tensors(source)
    for entry in description.entries():
        expected = split(entry.weight.layout, [given[name] for name in entry.huggingface], 0, 1, description.geometry)
        assert state[entry.name].dtype == torch.bfloat16 and torch.equal(state[entry.name], expected), entry.name
    assert len(state) == len(list(description.entries()))
    chunks = {name: [tuple(chunk.sizes) for chunk in each.chunks] for name, each in stored.items()}
    assert chunks["embedding.word_embeddings.weight"] == [(31, 64), (30, 64)]  # 61 words padded to 62
    assert chunks["decoder.layers.0.self_attention.linear_proj.weight"] == [(64, 64)] * 2
    assert chunks["decoder.layers.3.mlp.experts.local_experts.3.linear_fc1.weight"] == [(24, 64)] * 4
    assert chunks["decoder.layers.0.mlp.router.weight"] == [(4, 64)]


def test_transformers_reads_the_output(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = make("moe", tmp_path / "source")
    _, back = round_trip(source, tmp_path, TP2 | ETP2)
    ids = torch.arange(30)[None] % 61
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, back))
    assert torch.equal(before, after) and float(before.std()) > 0.1


def test_casting_says_so_in_the_config(tmp_path: Path) -> None:
    source = make("tied", tmp_path / "source")
    convert_to_megatron(source, tmp_path / "megatron")
    result = convert_to_huggingface(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16, verify=True)
    before, after = tensors(source), tensors(tmp_path / "back")
    assert result.compared.tensors == len(before)
    assert all(torch.equal(before[name].bfloat16(), tensor) for name, tensor in after.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert {**config, "dtype": "float32"} == {**json.loads((source / "config.json").read_text()), "dtype": "float32"}


def test_extras_that_hold_nothing_new_are_left_out(tmp_path: Path) -> None:
    source = make("tied", tmp_path / "source")
    embedding = tensors(source)["model.embed_tokens.weight"]
    change(source, lm_head__weight=embedding.clone(), model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(16))
    convert_to_megatron(source, tmp_path / "megatron")
    convert_to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert tensors(source).keys() - tensors(tmp_path / "back").keys() == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_a_missing_tokenizer_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make("dense", tmp_path / "source")
    for name in BESIDE:
        (source / name).unlink()
    convert_to_megatron(source, tmp_path / "megatron")
    assert "warning: no tokenizer in" in capsys.readouterr().err
    assert (tmp_path / "megatron" / "manifest.json").is_file()


class Killed(BaseException):
    """Not an error that anything catches."""


@pytest.mark.parametrize("direction", ["megatron", "huggingface"])
def test_a_killed_conversion_goes_on(tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source = make("moe", tmp_path / "source", torch.bfloat16)
    convert_to_megatron(source, tmp_path / "whole", ParallelConfig(**TP2), bucket_bytes=SMALL_BUCKET)
    convert_to_huggingface(tmp_path / "whole", tmp_path / "whole-back", bucket_bytes=SMALL_BUCKET)
    whole, output = tmp_path / ("whole" if direction == "megatron" else "whole-back"), tmp_path / "output"

    def convert() -> Any:
        if direction == "megatron":
            return convert_to_megatron(source, output, ParallelConfig(**TP2), bucket_bytes=SMALL_BUCKET, verify=True)
        return convert_to_huggingface(tmp_path / "whole", output, bucket_bytes=SMALL_BUCKET, verify=True)

    write = workspace.Workspace._write

    def die_at_the_fifth(self: Any, part: Any, *rest: Any) -> int:
        if part.number == 5:
            rest[-1].wait()
            (self.directory / part.file).write_bytes(b"half")
            raise Killed
        return write(self, part, *rest)

    monkeypatch.setattr(workspace.Workspace, "_write", die_at_the_fifth)
    with pytest.raises(Killed):
        convert()
    assert not output.exists()
    left = tmp_path / "output.incomplete"
    files = sorted(left.glob("tensors/*.distcp") if direction == "megatron" else left.glob("*.safetensors"))
    before = {file.name: file.stat().st_mtime_ns for file in files[:4]}
    assert len(files) == 5
    monkeypatch.undo()
    time.sleep(0.02)
    convert()
    assert "resuming: 4 of" in capsys.readouterr().err
    folder = output / "tensors" if direction == "megatron" else output
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert content(output) == content(whole)


def content(directory: Path) -> dict[str, bytes]:
    """Of every file; torch.save writes the same bytes for the same tensor."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


def test_leftovers_of_another_conversion_are_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    source = make("dense", tmp_path / "source")
    with monkeypatch.context() as patch:
        patch.setattr(ToMegatron, "finish", lambda *_: (_ for _ in ()).throw(ConvertError("stopped")))
        with pytest.raises(ConvertError, match="stopped"):
            convert_to_megatron(source, tmp_path / "megatron", bucket_bytes=SMALL_BUCKET)
    assert (tmp_path / "megatron.incomplete").is_dir()
    convert_to_megatron(source, tmp_path / "megatron", ParallelConfig(**TP2), bucket_bytes=SMALL_BUCKET)
    assert "is of another conversion" in capsys.readouterr().err
    layout = json.loads((tmp_path / "megatron" / "manifest.json").read_text())["layout"]
    assert layout["tensor_parallel_size"] == 2


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(tmp_path: Path) -> None:
    source = make("moe", tmp_path / "source", torch.bfloat16)
    flags = ["--bucket-mib", "1", "--verify"]
    big = make("dense", tmp_path / "big", hidden_size=256, intermediate_size=512, num_hidden_layers=6)
    for model in (source, big):
        shutil.rmtree(tmp_path / "megatron", ignore_errors=True)
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        out = run_ranks(ROOT / "tools/convert_hf_to_megatron.py", 2, "--hf-model", str(model), "--output", str(tmp_path / "megatron"),
                        "--tensor-model-parallel-size", "2", *flags)
        assert out.count("verified bitwise") == out.count("wrote ") == 1
        run_ranks(ROOT / "tools/convert_megatron_to_hf.py", 2, "--checkpoint", str(tmp_path / "megatron"), "--output", str(tmp_path / "back"), *flags)
        assert_same(model, tmp_path / "back")
    convert_to_megatron(big, tmp_path / "alone", ParallelConfig(**TP2), bucket_bytes=1 << 20)
    mine, theirs = content(tmp_path / "megatron"), content(tmp_path / "alone")
    assert len(mine) > 10 and mine == theirs


@pytest.mark.parametrize(("kind", "layout"), [("moe", ["tensor_parallel_size=2", "expert_parallel_size=2"]),
                                              pytest.param("tied", ["pipeline_parallel_size=2"], marks=pytest.mark.slow)])
def test_training_starts_from_a_converted_checkpoint(tmp_path: Path, kind: str, layout: list[str]) -> None:
    """And what it saves becomes the same Hugging Face model again: from a run directory, in the dtype that was trained, not the stored one."""
    source = make(kind, tmp_path / "source", torch.bfloat16)
    convert_to_megatron(source, tmp_path / "megatron", ParallelConfig(**TP2), bucket_bytes=SMALL_BUCKET)
    run_ranks(Path(__file__).with_name("save_ranks.py"), 2, str(tmp_path / "megatron"), str(tmp_path / "run" / "checkpoints"), "bfloat16", *layout)
    stored = FileSystemReader(tmp_path / "run/checkpoints/step_000000/tensors").read_metadata().state_dict_metadata
    assert stored["decoder.final_layernorm.weight"].properties.dtype == torch.float32
    convert_to_huggingface(tmp_path / "run", tmp_path / "back", verify=True, bucket_bytes=SMALL_BUCKET)
    assert_same(source, tmp_path / "back")
