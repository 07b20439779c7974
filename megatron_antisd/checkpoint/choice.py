"""Which checkpoint a run goes on from: the newest one that is whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_antisd.parallel.checkpoint_files import (
    CheckpointError,
    DamagedCheckpointError,
    checkpoints,
    content_fault,
    read_manifest,
)
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.stored_weights import on_main

log = logging.getLogger(__name__)


def newest_whole(directory: Path, layout: ProcessLayout, *, checksums: bool) -> Path | None:
    """The checkpoint of the highest step in `directory` that is whole, or None where there is none of any kind. Damaged ones are passed over
    with a warning that names what is wrong. Collective.

    Raises CheckpointError where there are checkpoints and none is whole (starting anew would be a loss nobody asked for), and where a newer
    version wrote the newest one.
    """
    found = on_main(layout, lambda: checkpoints(directory))
    faults = []
    for path in reversed(found):
        try:
            verify(path, layout, checksums=checksums)
        except DamagedCheckpointError as error:
            faults.append(str(error))
            continue
        if layout.is_main:
            for fault in faults:
                log.warning("%s", fault)
            if faults:
                log.warning("falling back to %s; what is damaged can be deleted", path)
        return path
    if faults:
        raise CheckpointError(f"none of the {len(faults)} checkpoints in {directory} is whole:\n  " + "\n  ".join(faults) + "\nRestore one from a "
                              "copy, or start anew with checkpoint.resume=false or another run.name")
    return None


def verify(path: Path, layout: ProcessLayout, *, checksums: bool) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, in their sizes and, with `checksums`, with the content that was written: every
    rank reads its share. Collective. Raises DamagedCheckpointError, on every rank, naming the file."""
    manifest = on_main(layout, lambda: read_manifest(path))
    if checksums:
        _verify_content(path, manifest, layout)
    return manifest


def _verify_content(path: Path, manifest: dict[str, Any], layout: ProcessLayout) -> None:
    if "sha256" not in manifest and layout.is_main:
        log.warning("%s is of format %s, without checksums: only the sizes of its files were looked at", path, manifest["format"])
    digests = manifest.get("sha256", {})
    largest_first = sorted(digests, key=lambda name: (-manifest["files"][name], name))
    fault = content_fault(path, {name: digests[name] for name in largest_first[layout.rank :: layout.world_size]})
    everyone: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(everyone, fault)
    found = [fault for fault in everyone if fault is not None]
    if found:
        raise DamagedCheckpointError(f"{path} is damaged: {'; '.join(found)}; take another one, such as the step before it")
