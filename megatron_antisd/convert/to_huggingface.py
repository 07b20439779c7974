"""One of our checkpoints into a Hugging Face folder: sharded safetensors with an index, configuration, tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_antisd.convert.conversion import BUCKET_BYTES, Result, run_conversion
from megatron_antisd.convert.part_file import PartFile
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.rows import EntryRows
from megatron_antisd.convert.stored_tensors import StoredTensors, dtype_name
from megatron_antisd.convert.verify import Advance, Compared, check_checksums, compare
from megatron_antisd.convert.workspace import Part, fingerprint, plan_parts
from megatron_antisd.models.description import describe
from megatron_antisd.models.huggingface import (
    DTYPES,
    HuggingfaceCheckpoint,
    copy_model_files,
    model_files,
    shard_name,
    some,
    write_index,
)
from megatron_antisd.models.weight_map import Entry
from megatron_antisd.parallel.checkpoint_files import (
    WEIGHTS_ONLY,
    check_model,
    checkpoints,
    is_checkpoint,
    latest_checkpoint,
    read_manifest,
)

_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}


def convert_to_huggingface(checkpoint: str | Path, output: str | Path, hf_model: str | Path | None = None, *, dtype: torch.dtype | None = None,
                           verify: bool = False, bucket_bytes: int = BUCKET_BYTES) -> Result:
    """Write `output` from a checkpoint, or from the newest whole one of a run. `hf_model`: the folder to take configuration and tokenizer from,
    where it is not the checkpoint itself. `dtype` None keeps the model's."""
    folder = None if hf_model is None else Path(hf_model)
    return run_conversion(lambda: ToHuggingface(find_checkpoint(Path(checkpoint)), folder, dtype, bucket_bytes), Path(output),
                          verify=verify)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest whole one below a run directory. Raises ConvertError."""
    if is_checkpoint(path) or not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        if checkpoints(folder):
            newest = latest_checkpoint(folder)
            if newest is None:
                raise ConvertError(f"none of the checkpoints in {folder} is whole")
            return newest
    raise ConvertError(f"no checkpoint in {path}: it has neither manifest.json nor checkpoints/step_*; expected a checkpoint or a run directory")


class ToHuggingface:
    """Planned from the manifest and the tensors' metadata. Raises ConvertError, CheckpointError or ConfigError for a checkpoint that will not do."""

    def __init__(self, source: Path, hf_model: Path | None, dtype: torch.dtype | None, bucket_bytes: int) -> None:
        self._manifest = read_manifest(source)
        self.model_files = hf_model or source
        if not (self.model_files / "config.json").is_file():
            what = "its checkpoint was written by an earlier version; give" if hf_model is None else "expected"
            raise ConvertError(f"no config.json in {self.model_files}: {what} the model it was trained from with --hf-model")
        self._description = describe(self.model_files, 1)
        if hf_model is not None and ("model" in self._manifest or (source / "config.json").is_file()):
            check_model(source, self._manifest, self._description)
        self.source_checksums = {source / name: checksum for name, checksum in self._manifest.get("sha256", {}).items()}
        self._folder, self._written = source / "tensors", cache(HuggingfaceCheckpoint)
        self._dtype = dtype or self._recorded_dtype(source)
        self._check()
        sizes = [(entry, self._rows(entry).numel * self._target(entry).itemsize) for entry in self._description.entries()]
        self.parts = plan_parts(sizes, bucket_bytes, shard_name)
        tensors = [source / name for name in self._manifest["files"] if name.startswith("tensors/")]
        self.plan = fingerprint([*tensors, *model_files(self.model_files)], to="huggingface", dtype=str(self._dtype), bucket=bucket_bytes)

    @cached_property
    def _stored(self) -> StoredTensors:
        return StoredTensors(self._folder)

    def write(self, part: Part, file: PartFile) -> dict[str, Any]:
        """A safetensors file: its header, then the tensors' bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in part.entries:
            for name, shape in entry.huggingface.items():
                start, end = end, end + torch.Size(shape).numel() * self._target(entry).itemsize
                header[name] = {"dtype": _SPELLINGS[self._target(entry)], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in part.entries:
            for tensor in self._slices(entry):
                file.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        return {}

    def finish(self, directory: Path, records: Sequence[dict[str, Any]]) -> list[Path]:
        """The index, and the model's files with the dtype that was written."""
        named = {part.file: [name for entry in part.entries for name in entry.huggingface] for part in self.parts}
        written = [write_index(directory, named, sum(part.nbytes for part in self.parts)), *copy_model_files(self.model_files, directory)]
        keys = [key for key in ("dtype", "torch_dtype") if key in self._description.hf] or ["torch_dtype"]
        if self._dtype is not None and any(self._description.hf.get(key) != dtype_name(self._dtype) for key in keys):
            changed = self._description.hf | dict.fromkeys(keys, dtype_name(self._dtype))
            (directory / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
        return written

    def verify(self, directory: Path, part: Part, record: dict[str, Any], advance: Advance) -> Compared:
        """Every tensor of a shard against the checkpoint's, cast as it was."""
        check_checksums(directory, {record["file"]: record["sha256"]})
        return compare(map(self._rows, part.entries), self._written(directory), self._stored, self._dtype, advance)

    def _recorded_dtype(self, source: Path) -> torch.dtype | None:
        """Of a training checkpoint's model, whose main weights are stored instead; None where every tensor keeps its own."""
        if self._manifest.get("kind") == WEIGHTS_ONLY:
            return None
        name = self._manifest.get("dtype") or self._description.hf.get("dtype") or self._description.hf.get("torch_dtype")
        if name not in map(dtype_name, _SPELLINGS):
            raise ConvertError(f"neither {source} nor config.json says in which dtype the model is (found {name!r}); give --dtype")
        return getattr(torch, name)

    def _check(self) -> None:
        """Raises ConvertError where the tensors are not those of the model."""
        problems = []
        for entry in self._description.entries():
            expected = self._rows(entry).shape
            if entry.name not in self._stored:
                problems.append(f"missing {entry.name}")
            elif self._stored.shape(entry.name) != expected:
                problems.append(f"{entry.name} has shape {list(self._stored.shape(entry.name))}, expected {list(expected)}")
            elif not self._stored.is_whole(entry.name):
                problems.append(f"{entry.name} is not whole")
        if problems:
            raise ConvertError(f"the tensors in {self._folder} are not those of the model that {self.model_files / 'config.json'} describes: "
                               f"{some(problems)}")

    def _rows(self, entry: Entry) -> EntryRows:
        return EntryRows(entry=entry, geometry=self._description.geometry)

    def _target(self, entry: Entry) -> torch.dtype:
        return self._dtype or self._stored.dtype(entry.name)

    def _slices(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The bytes of all Hugging Face tensors of one parameter, in order."""
        target = self._target(entry)
        for runs in self._rows(entry).destinations():
            for run in runs:
                for piece in self._stored.slices(entry.name, run.first, run.count):
                    yield piece.to(target)
