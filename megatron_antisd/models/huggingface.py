"""Hugging Face checkpoints on disk: names, shapes and places from the safetensors headers alone, tensors as views of the files, and what stands
beside the weights."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_antisd.config import ConfigError
from megatron_antisd.models.description import ModelDescription
from megatron_antisd.models.mapped_file import MappedFile
from megatron_antisd.models.weight_map import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
CHECKPOINT_FILES = {"manifest.json", "state.json", "run_config.yaml"}
"""Beside the model's files in a checkpoint of this project."""
_MAX_HEADER = 100_000_000  # safetensors' own bound
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_SHOWN = 10
OPEN_FILES = 8
"""Files mapped at once: each holds a file handle, of which a process has a thousand or so."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes stand."""

    file: Path
    dtype: str
    """As safetensors spells it."""
    shape: Shape
    start: int
    nbytes: int


class HuggingfaceCheckpoint:
    """The tensors of a folder. Raises ConfigError for files that are missing, cut short or no safetensors, before any weight is read."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.files = _weight_files(self.directory)
        self.tensors: dict[str, StoredTensor] = {}
        for file, named in self.files.items():
            found = _read_header(file)
            absent = [name for name in named if name not in found]
            if absent:
                raise ConfigError(f"{self.directory / INDEX} says that {file.name} holds {some(absent)}; it does not: index and files do not belong "
                                  "together, download both again")
            if named and (unnamed := [name for name in found if name not in set(named)]):
                raise ConfigError(f"{file} holds {some(unnamed)}, which {INDEX} says are elsewhere or does not name; remove the stale file, or write "
                                  "the index anew")
            self.tensors |= found
        self._mapped = lru_cache(OPEN_FILES)(MappedFile)

    def check(self, description: ModelDescription) -> None:
        """Hold names, shapes and dtypes against config.json. Raises ConfigError that lists all differences."""
        expected = description.huggingface_shapes()
        problems = [f"missing {name}" for name in expected if name not in self.tensors]
        problems += [f"unknown {name}" for name in self.tensors if name not in expected and not self._is_harmless(name, description)]
        for name, shape in expected.items():
            if name in self.tensors and (found := self.tensors[name]).shape != shape:
                problems.append(f"{name} has shape {list(found.shape)}, expected {list(shape)}")
            elif name in self.tensors and found.dtype not in DTYPES:
                problems.append(f"{name} is stored as {found.dtype}, expected one of {', '.join(DTYPES)}")
        if problems:
            raise ConfigError(f"the weights in {self.directory} are not those of the model that its config.json describes: {some(problems)}")

    def read(self, name: str) -> torch.Tensor:
        """A view of the file. The tensor must exist and have one of `DTYPES`."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows [first, first + count) alone."""
        stored, dtype = self.tensors[name], self.dtype(name)
        row = math.prod(stored.shape[1:]) * dtype.itemsize
        return self._mapped(stored.file).tensor(dtype, (count, *stored.shape[1:]), stored.start + first * row)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.tensors[name].dtype]

    def _is_harmless(self, name: str, description: ModelDescription) -> bool:
        """Not a weight, or a second copy of one."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        (embedding,) = description.embedding().huggingface
        if not (description.tied and name == "lm_head.weight" and embedding in self.tensors):
            return False
        if (self.tensors[name].dtype, self.tensors[name].shape) == (self.tensors[embedding].dtype, self.tensors[embedding].shape) and (
                same_bytes(self.read(name), self.read(embedding))):
            return True
        raise ConfigError(f"{self.directory}: config.json says tie_word_embeddings, but lm_head.weight differs from {embedding}; set it to false, or "
                          "remove the tensor that is wrong")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def some(items: Sequence[str]) -> str:
    """The first ten, and how many there are."""
    shown = "; ".join(items[:_SHOWN])
    return shown if len(items) <= _SHOWN else f"{shown}; and {len(items) - _SHOWN} more"


# -- what stands beside the weights ---------------------------------------------------------------------------------------


def model_files(directory: Path) -> list[Path]:
    """Configuration, tokenizer, generation settings, chat template: every file but weights, their index and a checkpoint's own."""
    return [file for file in sorted(directory.iterdir())
            if file.is_file() and file.suffix not in WEIGHT_SUFFIXES and not file.name.startswith(".") and not file.name.endswith(".index.json")
            and file.name not in CHECKPOINT_FILES]


def copy_model_files(source: Path, target: Path) -> list[Path]:
    """Copies of `model_files`, which it returns."""
    return [Path(shutil.copyfile(file, target / file.name)) for file in model_files(source)]


def shard_name(number: int, count: int) -> str:
    """Of the shards 1 to `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, files: Mapping[str, Iterable[str]], total_size: int) -> Path:
    """`files`: names of shards and of their tensors."""
    weight_map = {name: file for file, names in files.items() for name in names}
    path = directory / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=1))
    return path


# -- headers --------------------------------------------------------------------------------------------------------------


def _weight_files(directory: Path) -> dict[Path, list[str]]:
    """Every file with the names that the index says are in it."""
    if not directory.is_dir():
        raise ConfigError(f"no directory at {directory}; expected a Hugging Face checkpoint")
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise ConfigError(f"{directory} holds neither {SINGLE} nor {INDEX}; weights in other formats must be saved as safetensors first "
                              "(transformers' save_pretrained does)")
        return {directory / SINGLE: []}
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is no index of safetensors files ({type(error).__name__}: {error}); download it again") from error
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        files.setdefault(directory / file, []).append(name)
    absent = [f"{file.name} ({len(names)} tensors)" for file, names in files.items() if not file.is_file()]
    if absent:
        raise ConfigError(f"{directory} lacks {len(absent)} of the {len(files)} files that {INDEX} names: {some(absent)}; download them")
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """A safetensors file begins with the length of its header (8 bytes, little-endian) and the header in JSON."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER:
            stream.seek(0)
            pointer = stream.read(64).startswith(b"version https://git-lfs")
            raise ConfigError(f"{file} is " + ("a Git LFS pointer, not the weights; fetch them with `git lfs pull`" if pointer else
                                               f"not a safetensors file ({size} bytes); download it again"))
        if size < 8 + length:
            raise ConfigError(f"{file} is truncated: {size} bytes, its header alone needs {8 + length}; download it again")
        try:
            header = json.loads(stream.read(length))
            found = {name: _stored(file, 8 + length, row) for name, row in header.items() if name != "__metadata__"}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file} is not a safetensors file: its header cannot be read ({type(error).__name__}: {error})") from error
    expected = max((place.start + place.nbytes for place in found.values()), default=8 + length)
    if size != expected:
        what = "is truncated" if size < expected else "has bytes behind its last tensor"
        raise ConfigError(f"{file} {what}: {size} bytes, expected {expected}; download it again")
    for name, place in found.items():
        if place.nbytes != torch.Size(place.shape).numel() * _ITEM_SIZES.get(place.dtype, 0) and place.dtype in _ITEM_SIZES:
            raise ConfigError(f"{file}: {name} of dtype {place.dtype} and shape {list(place.shape)} has {place.nbytes} bytes; the file is damaged")
    repeated = [place for place, count in Counter(place.start for place in found.values() if place.nbytes).items() if count > 1]
    if repeated:
        raise ConfigError(f"{file}: several tensors begin at the bytes {repeated[:_SHOWN]}; the file is damaged")
    return found


def _stored(file: Path, data: int, row: dict[str, Any]) -> StoredTensor:
    start, stop = row["data_offsets"]
    return StoredTensor(file=file, dtype=row["dtype"], shape=tuple(row["shape"]), start=data + start, nbytes=stop - start)
