"""What cannot be converted is refused by name, before any work where it can be, and never leaves anything under the output's name."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert.models import SMALL_BUCKET, change, make, shard, tensors
from distributed import run_ranks
from safetensors.torch import load_file, save_file

from megatron_antisd.config import ParallelConfig
from megatron_antisd.convert.part_file import PartFile
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.to_huggingface import convert_to_huggingface
from megatron_antisd.convert.to_megatron import ToMegatron, convert_to_megatron
from megatron_antisd.parallel.checkpoint_files import write_manifest

ROOT = Path(__file__).resolve().parents[2]


def missing_tensor(model: Path) -> None:
    change(model, model__norm__weight=None, model__layers__3__mlp__up_proj__weight=None)


def extra_tensor(model: Path) -> None:
    change(model, model__layers__4__mlp__up_proj__weight=torch.ones(3))


def bias(model: Path) -> None:
    change(model, **{f"model__layers__{layer}__self_attn__{name}_proj__bias": torch.ones(3) for layer in range(4) for name in "qkv"})


def wrong_shape(model: Path) -> None:
    change(model, model__layers__2__mlp__down_proj__weight=torch.ones(96, 64))


def quantised(model: Path) -> None:
    change(model, model__norm__weight=torch.ones(64, dtype=torch.int8))


def mixed(model: Path) -> None:
    change(model, model__layers__0__self_attn__k_proj__weight=tensors(model)["model.layers.0.self_attn.k_proj.weight"].bfloat16())


def untied(model: Path) -> None:
    change(model, lm_head__weight=torch.ones(61, 64))
    edit(model / "config.json", tie_word_embeddings=True)


def truncated(model: Path) -> None:
    shard(model, 3)
    file = model / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_header(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def too_long(model: Path) -> None:
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"more")


def missing_shard(model: Path) -> None:
    shard(model, 3)
    (model / "model-00002-of-00003.safetensors").unlink()


def wrong_index(model: Path) -> None:
    shard(model, 2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.mlp.other"] = "model-00001-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def stale_shard(model: Path) -> None:
    shard(model, 2)
    second = model / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "model.embed_tokens.weight": torch.ones(61, 64)}, second)


def index_without_map(model: Path) -> None:
    shard(model, 2)
    (model / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def config_of_nothing(model: Path) -> None:
    (model / "config.json").write_text("[]")


def config_without_sizes(model: Path) -> None:
    fields = json.loads((model / "config.json").read_text())
    del fields["intermediate_size"]
    (model / "config.json").write_text(json.dumps(fields))


def a_checkpoint(model: Path) -> None:
    (model / "manifest.json").write_text("{}")


def broken_index(model: Path) -> None:
    shard(model, 2)
    (model / "model.safetensors.index.json").write_text("{")


def pointer(model: Path) -> None:
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")


def something_else(model: Path) -> None:
    (model / "model.safetensors").write_bytes(bytes(range(256)))


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def another_family(model: Path) -> None:
    edit(model / "config.json", model_type="llama")


def attention_bias(model: Path) -> None:
    edit(model / "config.json", attention_bias=True)


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def gone(model: Path) -> None:
    shutil.rmtree(model)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CASES: list[tuple[Callable[[Path], None], list[str]]] = [
    (missing_tensor, ["missing model.layers.3.mlp.up_proj.weight; missing model.norm.weight", "config.json describes"]),
    (extra_tensor, ["unknown model.layers.4.mlp.up_proj.weight"]),
    (bias, ["unknown model.layers.", "; and 2 more"]),
    (wrong_shape, ["model.layers.2.mlp.down_proj.weight has shape [96, 64], expected [64, 96]"]),
    (quantised, ["model.norm.weight is stored as I8, expected one of F32, BF16, F16"]),
    (mixed, ["model.layers.0.self_attn.q_proj.weight", "must have one dtype; they have ['bfloat16', 'float32']"]),
    (untied, ["tie_word_embeddings", "lm_head.weight differs from model.embed_tokens.weight"]),
    (truncated, ["model-00002-of-00003.safetensors is truncated: ", "bytes, expected "]),
    (truncated_header, ["model.safetensors is truncated: 100 bytes, its header alone needs "]),
    (too_long, ["model.safetensors has bytes behind its last tensor: ", "bytes, expected "]),
    (missing_shard, ["lacks 1 of the 3 files", "model-00002-of-00003.safetensors ("]),
    (wrong_index, ["says that model-00001-of-00002.safetensors holds model.layers.0.mlp.other; it does not"]),
    (stale_shard, ["model-00002-of-00002.safetensors holds model.embed_tokens.weight, which model.safetensors.index.json says"]),
    (index_without_map, ["model.safetensors.index.json is no index of safetensors files (TypeError"]),
    (config_of_nothing, ["config.json holds a list, expected an object"]),
    (config_without_sizes, ["config.json lacks 'intermediate_size', which a qwen3 model needs"]),
    (a_checkpoint, ["is a checkpoint of this project already; tools/convert_megatron_to_hf.py reads it"]),
    (broken_index, ["model.safetensors.index.json is no index of safetensors files (JSONDecodeError"]),
    (pointer, ["is a Git LFS pointer", "git lfs pull"]),
    (something_else, ["model.safetensors is not a safetensors file (256 bytes)"]),
    (no_weights, ["holds neither model.safetensors nor model.safetensors.index.json"]),
    (another_family, ["model_type 'llama' is not supported; supported are ['olmo3', 'qwen3', 'qwen3_moe']"]),
    (attention_bias, ["attention_bias=true is not supported for qwen3"]),
    (broken_config, ["config.json is not valid JSON"]),
    (gone, ["no config.json in "]),
]


@pytest.mark.parametrize(("spoil", "parts"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_source_that_will_not_do(tmp_path: Path, spoil: Callable[[Path], None], parts: list[str]) -> None:
    model = make("dense", tmp_path / "model")
    spoil(model)
    with pytest.raises(ConvertError) as caught:
        convert_to_megatron(model, tmp_path / "output")
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)
    assert not list(tmp_path.glob("output*"))


def test_all_differences_are_listed_together(tmp_path: Path) -> None:
    model = make("moe", tmp_path / "model")
    for spoil in (missing_router, extra_tensor):
        spoil(model)
    with pytest.raises(ConvertError, match="missing model.layers.1.mlp.gate.weight; unknown model.layers.4.mlp.up_proj.weight"):
        convert_to_megatron(model, tmp_path / "output")


def missing_router(model: Path) -> None:
    change(model, model__layers__1__mlp__gate__weight=None)


@pytest.mark.parametrize(("layout", "parts"), [
    ({"tensor_parallel_size": 4}, ["num_key_value_heads=2, must be divisible by parallel.tensor_parallel_size=4"]),
    ({"tensor_parallel_size": 3}, ["num_attention_heads=4, must", "hidden_size=64, must"]),
    ({"expert_parallel_size": 3}, ["num_experts=4, must be divisible by parallel.expert_parallel_size=3"]),
    ({"expert_tensor_parallel_size": 5}, ["moe_intermediate_size=48, must be divisible by parallel.expert_tensor_parallel_size=5"]),
    ({"pipeline_parallel_size": 5}, ["num_hidden_layers=4, are fewer than parallel.pipeline_parallel_size=5"]),
    ({"virtual_pipeline_size": 2}, ["virtual_pipeline_size=2 needs parallel.pipeline_parallel_size above 1"]),
], ids=str)
def test_layout_the_model_cannot_be_split_into(tmp_path: Path, layout: dict[str, int], parts: list[str]) -> None:
    model = make("moe", tmp_path / "model")
    with pytest.raises(ConvertError) as caught:
        convert_to_megatron(model, tmp_path / "output", ParallelConfig(**layout))
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)
    assert not list(tmp_path.glob("output*"))


def test_output_that_exists(tmp_path: Path) -> None:
    model = make("dense", tmp_path / "model")
    (tmp_path / "output").mkdir()
    (tmp_path / "foreign.incomplete").mkdir()
    with pytest.raises(ConvertError, match="output exists already; name another --output or remove it"):
        convert_to_megatron(model, tmp_path / "output")
    with pytest.raises(ConvertError, match="foreign.incomplete exists and is not an unfinished conversion"):
        convert_to_megatron(model, tmp_path / "foreign")
    assert not list((tmp_path / "output").iterdir()) and not list((tmp_path / "foreign.incomplete").iterdir())


def test_a_disk_that_is_too_small_is_seen_before_any_work(tmp_path: Path) -> None:
    """The model is as large as all free space twice over: its file has a hole instead of weights."""
    model = make("dense", tmp_path / "model", num_hidden_layers=1)
    words = 2 * shutil.disk_usage(tmp_path).free // (64 * 4)
    edit(model / "config.json", vocab_size=words)
    found = tensors(model)
    header, at = {}, 0
    for name, tensor in found.items():
        shape = [words, 64] if "embed_tokens" in name or "lm_head" in name else list(tensor.shape)
        size = torch.Size(shape).numel() * 4
        header[name], at = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}, at + size
    text = json.dumps(header).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    with pytest.raises(ConvertError, match=r"not enough room for .*output: \d+ bytes are needed, \d+ are free"):
        convert_to_megatron(model, tmp_path / "output")
    assert not list(tmp_path.glob("output*"))


LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); sys.path.insert(0, {root!r}); " \
          "from megatron_antisd.convert.commands import {command} as command; sys.exit(command(sys.argv[1:]))"


@pytest.mark.parametrize("command", ["hf_to_megatron", "megatron_to_hf"])
def test_a_disk_that_refuses_a_write(tmp_path: Path, command: str) -> None:
    """Files end at 700 KiB, as on a disk that is full: the parts before are kept, and with room the same command goes on."""
    model = make("dense", tmp_path / "model", vocab_size=61, hidden_size=256)
    change(model)  # one file
    convert_to_megatron(model, tmp_path / "checkpoint")
    source = ["--hf-model", str(model)] if command == "hf_to_megatron" else ["--checkpoint", str(tmp_path / "checkpoint")]
    arguments = [*source, "--output", str(tmp_path / "output"), "--bucket-mib", "1"]
    done = run_limited(command, arguments, 700 << 10)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: could not write to " in done.stderr and "File too large; its finished parts are kept" in done.stderr
    assert not (tmp_path / "output").exists() and (tmp_path / "output.incomplete").is_dir()
    done = run_limited(command, arguments, 100 << 20)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "config.json").is_file() and not (tmp_path / "output.incomplete").exists()


def run_limited(command: str, arguments: list[str], limit: int) -> subprocess.CompletedProcess[str]:
    program = LIMITED.format(limit=limit, root=str(ROOT), command=command)
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


# -- checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    convert_to_megatron(make("tied", directory / "model"), directory / "whole", bucket_bytes=SMALL_BUCKET)
    return directory / "whole"


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def shorten(copy: Path) -> None:
    data = sorted(copy.glob("tensors/*.distcp"))[1]
    data.write_bytes(data.read_bytes()[:-1])


def flip(copy: Path) -> None:
    data = bytearray((copy / "tensors/part-00002.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "tensors/part-00002.distcp").write_bytes(data)


def unreadable_metadata(copy: Path) -> None:
    size = (copy / "tensors/.metadata").stat().st_size
    (copy / "tensors/.metadata").write_bytes(b"x" * size)


def written_anew(copy: Path, **sizes: int | None) -> None:
    """A manifest that says so itself, with other sizes, or without the files whose size is None."""
    manifest = json.loads((copy / "manifest.json").read_text())
    files = {name: size for name, size in (manifest.pop("files") | sizes).items() if size is not None}
    digests = {name: digest for name, digest in manifest.pop("sha256").items() if name in files}
    del manifest["digest"]
    write_manifest(copy, manifest, files, digests)


def without_config(copy: Path) -> None:
    written_anew(copy, **{"config.json": None})
    (copy / "config.json").unlink()


def another_model(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=5)
    written_anew(copy, **{"config.json": (copy / "config.json").stat().st_size})


@pytest.mark.parametrize(("spoil", "parts"), [
    (shorten, ["is not a whole checkpoint: tensors/part-00002.distcp has", "bytes, expected"]),
    (lambda copy: (copy / "tensors/part-00001.distcp").unlink(), ["tensors/part-00001.distcp is missing"]),
    (lambda copy: (copy / "manifest.json").write_text("{"), ["manifest.json cannot be read (JSONDecodeError"]),
    (lambda copy: (copy / "manifest.json").unlink(), ["no checkpoint in", "expected a checkpoint or a run directory"]),
    (unreadable_metadata, [".metadata cannot be read", "the checkpoint is damaged"]),
    (without_config, ["no config.json in", "--hf-model"]),
    (another_model, ["missing decoder.layers.4.self_attention.linear_qkv.weight", "config.json describes"]),
    (shutil.rmtree, ["is not a whole checkpoint: there is no such directory"]),
], ids=["shortened", "file missing", "manifest broken", "manifest missing", "metadata broken", "no config", "another model", "nothing there"])
def test_checkpoint_that_will_not_do(tmp_path: Path, copy: Path, spoil: Callable[[Path], None], parts: list[str]) -> None:
    spoil(copy)
    with pytest.raises(ConvertError) as caught:
        convert_to_huggingface(copy, tmp_path / "output")
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)
    assert not list(tmp_path.glob("output*"))


def test_verify_looks_at_the_checksums(tmp_path: Path, copy: Path) -> None:
    flip(copy)
    with pytest.raises(ConvertError, match="part-00002.distcp is damaged: its SHA-256 is .*, the manifest says "):
        convert_to_huggingface(copy, tmp_path / "output", verify=True)
    assert not list(tmp_path.glob("output*"))


def test_verify_compares_every_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit is flipped between writing and checksum: only the comparison with the source can find it."""
    from megatron_antisd.convert.stored_tensors import store
    from megatron_antisd.convert.to_megatron import ToMegatron

    def spoiled(file: object, pieces: object, shape: object) -> object:
        def each() -> object:
            for offset, piece in pieces:
                if tuple(piece.shape) == (64,):
                    piece = piece.clone()
                    piece.view(torch.int32)[7] ^= 1
                yield offset, piece
        return store(file, each(), shape)

    monkeypatch.setattr(sys.modules[ToMegatron.__module__], "store", spoiled)
    model = make("dense", tmp_path / "model")
    with pytest.raises(ConvertError, match="verification: model.layers.0.input_layernorm.weight differs in rows 0 to 63"):
        convert_to_megatron(model, tmp_path / "output", verify=True)
    assert not list(tmp_path.glob("output*"))


def test_hf_model_in_place_of_the_checkpoints_own_files(tmp_path: Path, copy: Path, checkpoint: Path) -> None:
    without_config(copy)
    convert_to_huggingface(copy, tmp_path / "output", checkpoint.parent / "model")
    assert tensors(tmp_path / "output").keys() == tensors(checkpoint.parent / "model").keys()
    with pytest.raises(ConvertError, match="is a checkpoint of another model|no config.json"):
        convert_to_huggingface(checkpoint, tmp_path / "second", make("tied", tmp_path / "other", rope_theta=5.0))


def test_command_says_it_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "tools/convert_hf_to_megatron.py", "--hf-model", tmp_path / "nowhere", "--output", tmp_path / "x"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: no config.json in ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    model = make("dense", tmp_path / "model", hidden_size=256)
    script = tmp_path / "limited.py"
    script.write_text("import os, resource, sys\nif os.environ['RANK'] == '1':\n    resource.setrlimit(resource.RLIMIT_FSIZE, (900_000,) * 2)\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\nfrom megatron_antisd.convert.commands import hf_to_megatron\nsys.exit(hf_to_megatron())\n")
    with pytest.raises(AssertionError, match="could not write to .*File too large"):
        run_ranks(script, 2, "--hf-model", str(model), "--output", str(tmp_path / "output"), "--bucket-mib", "1", timeout=120)
    assert not (tmp_path / "output").exists()


def test_a_second_process_is_told_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("dense", tmp_path / "model")

    def meanwhile(*_: object) -> None:
        with pytest.raises(ConvertError, match="another process is writing to .*output.incomplete"):
            convert_to_megatron(model, tmp_path / "output")
        raise ConvertError("the first one ends")

    with monkeypatch.context() as patch:
        patch.setattr(ToMegatron, "finish", meanwhile)
        with pytest.raises(ConvertError, match="the first one ends"):
            convert_to_megatron(model, tmp_path / "output")
    convert_to_megatron(model, tmp_path / "output", verify=True)


@pytest.mark.parametrize("torn", ["", "{"])
def test_a_beginning_that_was_cut_short_is_begun_again(tmp_path: Path, torn: str) -> None:
    model = make("dense", tmp_path / "model")
    (tmp_path / "output.incomplete" / "conversion").mkdir(parents=True)
    (tmp_path / "output.incomplete" / "conversion" / "plan.json").write_text(torn)
    convert_to_megatron(model, tmp_path / "output", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "output"]
    assert not (tmp_path / "output" / "conversion").exists()


@pytest.mark.parametrize("text", ["[]", "null", '{"files": []}', '{"files": 3}', '{"files": {}}'])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "manifest.json").write_text(text)
    with pytest.raises(ConvertError, match=r"is not a whole checkpoint: manifest.json cannot be read|has format None"):
        convert_to_huggingface(tmp_path / "checkpoint", tmp_path / "output")


def test_an_interrupted_write_stays_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save turns it into an error of its own."""
    model = make("dense", tmp_path / "model")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PartFile, "_write_slice", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_to_megatron(model, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_few_file_handles_are_enough(tmp_path: Path) -> None:
    """Many more parts than a process may have files open, verified."""
    model = make("moe", tmp_path / "model")
    limited = ("import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (72, 72)); "
               "from megatron_antisd.convert.to_megatron import convert_to_megatron as c; "
               "print(c(sys.argv[1], sys.argv[2], verify=True, bucket_bytes=1 << 9).parts)")
    done = subprocess.run([sys.executable, "-c", limited, str(model), str(tmp_path / "output")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) > 50


def test_a_file_that_repeats_a_tensors_bytes(tmp_path: Path) -> None:
    model = make("dense", tmp_path / "model")
    save_file(tensors(model), model / "model.safetensors")
    data = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.layers.0.input_layernorm.weight"]["data_offsets"] = header["model.layers.1.input_layernorm.weight"]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ConvertError, match="several tensors begin at the bytes"):
        convert_to_megatron(model, tmp_path / "output")
