"""A Hugging Face checkpoint into one of ours: a Hugging Face folder whose weights are `tensors/` and `manifest.json` instead of safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megatron_antisd.config import ParallelConfig
from megatron_antisd.config.rules import check_model
from megatron_antisd.convert.conversion import BUCKET_BYTES, Result, run_conversion
from megatron_antisd.convert.part_file import PartFile
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.rows import EntryRows
from megatron_antisd.convert.stored_tensors import StoredTensors, dtype_name, metadata, store, without_crc
from megatron_antisd.convert.verify import Advance, Compared, check_checksums, compare
from megatron_antisd.convert.workspace import Part, fingerprint, plan_parts
from megatron_antisd.durable import file_sha256
from megatron_antisd.models.description import describe
from megatron_antisd.models.huggingface import HuggingfaceCheckpoint, copy_model_files, model_files
from megatron_antisd.models.weight_map import Entry, Layout
from megatron_antisd.parallel.checkpoint_files import FORMAT, MANIFEST, WEIGHTS_ONLY, is_checkpoint, write_manifest
from megatron_antisd.parallel.global_tensors import place_shard

FOLDER = "tensors"


def convert_to_megatron(hf_model: str | Path, output: str | Path, parallel: ParallelConfig | None = None, *, verify: bool = False,
                        bucket_bytes: int = BUCKET_BYTES) -> Result:
    """Write the checkpoint `output`. `parallel` decides how its tensors are cut, not who can read them: any layout can."""
    return run_conversion(lambda: ToMegatron(Path(hf_model), parallel or ParallelConfig(), bucket_bytes), Path(output), verify=verify)


class ToMegatron:
    """Planned from config.json and the safetensors headers. Raises ConfigError or ConvertError for a source or a layout that will not do."""

    def __init__(self, source: Path, parallel: ParallelConfig, bucket_bytes: int) -> None:
        if is_checkpoint(source):
            raise ConvertError(f"{source} is a checkpoint of this project already; tools/convert_megatron_to_hf.py reads it")
        self.model_files, self._parallel, self.source_checksums = source, parallel, {}
        self._description = describe(source, parallel.tensor_parallel_size)
        self._unpadded = describe(source, 1).geometry
        check_model(parallel, self._description.hf)
        self._hf, self._written = HuggingfaceCheckpoint(source), cache(StoredTensors)
        self._hf.check(self._description)
        sizes = [(entry, self._size(entry)) for entry in self._description.entries()]
        self.parts = plan_parts(sizes, bucket_bytes, lambda number, _: f"{FOLDER}/part-{number:05d}.distcp")
        self.plan = fingerprint([*self._hf.files, *model_files(source)], to="megatron", format=FORMAT, bucket=bucket_bytes,
                                layout=parallel.model_dump(mode="json"))

    def write(self, part: Part, file: PartFile) -> dict[str, Any]:
        """One tensor after the other, cut for the layout's tensor-parallel ranks."""
        with without_crc():
            return {"tensors": {entry.name: store(file, self._pieces(entry), self._rows(entry).shape) for entry in part.entries}}

    def finish(self, directory: Path, records: Sequence[dict[str, Any]]) -> list[Path]:
        """The tensors' metadata, the model's files, and the manifest, which names all others."""
        path = directory / FOLDER / ".metadata"
        path.write_bytes(metadata(records, FOLDER))
        written = [path, *copy_model_files(self.model_files, directory)]
        beside = {str(file.relative_to(directory)): file for file in written}
        dtypes = {stored["dtype"] for record in records for stored in record["tensors"].values()}
        manifest = {
            "kind": WEIGHTS_ONLY, "dtype": dtypes.pop() if len(dtypes) == 1 else None,
            "layout": self._parallel.model_dump(mode="json", exclude={"timeout_seconds", "distributed_optimizer"}),
        }
        sizes = {name: file.stat().st_size for name, file in beside.items()} | {record["file"]: record["size"] for record in records}
        digests = {name: file_sha256(file) for name, file in beside.items()} | {record["file"]: record["sha256"] for record in records}
        write_manifest(directory, manifest, sizes, digests)
        return [*written, directory / MANIFEST]

    def verify(self, directory: Path, part: Part, record: dict[str, Any], advance: Advance) -> Compared:
        """The file's checksum, and every tensor in it against the source."""
        check_checksums(directory, {record["file"]: record["sha256"]})
        return compare(map(self._rows, part.entries), self._hf, self._written(directory / FOLDER), None, advance)

    def _rows(self, entry: Entry) -> EntryRows:
        return EntryRows(entry=entry, geometry=self._unpadded)

    def _size(self, entry: Entry) -> int:
        dtypes = {self._hf.dtype(name) for name in entry.huggingface}
        if len(dtypes) > 1:
            raise ConvertError(f"{', '.join(entry.huggingface)} become one tensor and must have one dtype; "
                               f"they have {sorted(map(dtype_name, dtypes))}")
        return sum(self._hf.tensors[name].nbytes for name in entry.huggingface)

    def _pieces(self, entry: Entry) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """The rectangles that the layout's ranks hold: (offset in the global tensor, values)."""
        layout, parallel = entry.weight.layout, self._parallel
        ranks = parallel.expert_tensor_parallel_size if entry.weight.expert else parallel.tensor_parallel_size
        ranks = 1 if layout is Layout.REPLICATED else ranks
        shape, rows, names = self._description.shard_shape(entry, ranks), self._rows(entry), list(entry.huggingface)
        for rank in range(ranks):
            placed = place_shard(torch.empty(shape, device="meta"), 0, shape, layout, rank, ranks, self._unpadded.vocab_size)
            for offset, piece in placed.pieces.items():
                yield offset, self._values(rows, names, offset, piece.shape)

    def _values(self, rows: EntryRows, names: Sequence[str], offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        runs = list(rows.sources(offset[0], shape[0]))
        if len(runs) == 1 and (len(shape) == 1 or shape[1] == rows.columns):
            return self._hf.rows(names[runs[0].tensor], runs[0].first, runs[0].count)
        values, row = torch.empty(shape, dtype=self._hf.dtype(names[0])), 0
        for run in runs:
            found = self._hf.rows(names[run.tensor], run.first, run.count)
            values[row : row + run.count] = found[:, offset[1] : offset[1] + shape[1]] if len(shape) == 2 else found
            row += run.count
        return values
