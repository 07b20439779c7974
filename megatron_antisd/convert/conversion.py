"""What both directions share: from the first look at the source to the output's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_antisd.convert.part_file import PartFile
from megatron_antisd.convert.progress import Progress
from megatron_antisd.convert.ranks import ConvertError, Ranks
from megatron_antisd.convert.verify import Advance, Compared, Difference, check_checksums
from megatron_antisd.convert.workspace import Part, Workspace, missing_tokenizer, require_free, warn

BUCKET_BYTES = 512 << 20


class Conversion(Protocol):
    """One direction, planned: every rank makes the same plan from headers and metadata alone."""

    parts: Sequence[Part]
    plan: str
    """Fingerprint of the sources and of all settings."""
    model_files: Path
    """Folder of config.json and tokenizer."""
    source_checksums: Mapping[Path, str]
    """SHA-256 of the source's files, as far as it tells them."""

    def write(self, part: Part, file: PartFile) -> dict[str, Any]:
        """Fill a part's file; what to remember of it."""
        ...

    def finish(self, directory: Path, records: Sequence[dict[str, Any]]) -> list[Path]:
        """Write what stands beside the parts, and return those files."""
        ...

    def verify(self, directory: Path, part: Part, record: dict[str, Any], advance: Advance) -> Compared:
        """Hold one part of the output in `directory` against the source."""
        ...


@dataclass(frozen=True, kw_only=True)
class Result:
    tensors: int
    """Parameters written."""
    nbytes: int
    parts: int
    compared: Compared | None
    """Where it was verified."""


def run_conversion(make: Callable[[], Conversion], output: Path, *, verify: bool, say: Callable[[str], None] = warn) -> Result:
    """Plan, write, verify, commit. Under torchrun every rank calls it. Raises ConvertError, on every rank, with nothing under the output's name."""
    ranks, output = Ranks(), Path(os.path.abspath(output))
    planned: list[Conversion] = []
    workspace: Workspace | None = None
    try:
        ranks.on_main(lambda: require_free(output))
        ranks.together(lambda: planned.append(make()))
        (conversion,) = planned
        if len(set(ranks.together(lambda: conversion.plan))) > 1:
            raise ConvertError("the ranks found different sources: one was written meanwhile; run the same command again")
        if verify:
            shared = list(conversion.source_checksums.items())[ranks.rank :: ranks.size]
            ranks.together(lambda: [check_checksums(file.parent, {file.name: checksum}) for file, checksum in shared])
        workspace = Workspace(output, conversion.parts, ranks, say)
        ranks.on_main(lambda: workspace.prepare(conversion.plan))
        if ranks.is_main and (warning := missing_tokenizer(conversion.model_files)):
            say(warning)
        with Progress(f"to {output.name}", visible=ranks.is_main) as progress:
            records = workspace.convert(conversion.write, progress)
            files = ranks.on_main(lambda: conversion.finish(workspace.directory, records))
            compared = _verify(conversion, workspace, records, ranks, progress) if verify else None
        ranks.on_main(lambda: workspace.commit(files))
    finally:
        if workspace is not None:
            workspace.release()
        ranks.close()
    return Result(tensors=sum(len(part.entries) for part in conversion.parts), nbytes=sum(part.nbytes for part in conversion.parts),
                  parts=len(conversion.parts), compared=compared)


def _verify(conversion: Conversion, workspace: Workspace, records: Sequence[dict[str, Any]], ranks: Ranks, progress: Progress) -> Compared:
    progress.begin(sum(part.nbytes for part in conversion.parts) // ranks.size, title="verify")

    def mine() -> Compared:
        shared = list(zip(conversion.parts, records, strict=True))[ranks.rank :: ranks.size]
        try:
            return sum((conversion.verify(workspace.directory, part, record, progress.advance) for part, record in shared), Compared())
        except Difference as error:
            return Compared(difference=str(error))

    compared = sum(ranks.together(mine), Compared())
    if compared.difference:
        ranks.on_main(workspace.discard)
        raise ConvertError(compared.difference)
    return compared
