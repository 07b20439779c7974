"""A checkpoint as files: which directories are whole, and what the manifest says.

A training checkpoint and one converted from Hugging Face (`kind` "weights") differ only in what they hold besides the weights. The manifest is
written last. It names every other file with its size and SHA-256, and holds a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_antisd.durable import file_sha256, write_json
from megatron_antisd.models.description import ModelDescription, describe

FORMAT = 2
READABLE = (1, 2)
"""Format 1 has no digests: its files are known by their sizes alone."""
WEIGHTS_ONLY = "weights"
MANIFEST, STATE, RUN_CONFIG = "manifest.json", "state.json", "run_config.yaml"
UNFINISHED = ".tmp"
"""Ending of a directory that is being written or deleted."""
_NAME = re.compile(r"step_(\d+)")
# Fields that say nothing of the weights' shapes or of what the model computes from them, and those that versions of transformers
# write under several names: `rope` and `experts` stand for them.
_IGNORED_FIELDS = {
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "initializer_range", "max_position_embeddings", "output_router_logits", "router_aux_loss_coef", "attention_dropout",
    "rope_theta", "rope_scaling", "rope_parameters", "num_experts", "num_local_experts",
}  # fmt: skip

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or cannot be loaded here; the message says why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """One whose files are not those that were written: an older one may still be whole."""


def is_checkpoint(path: str | Path) -> bool:
    """Whether a model directory's weights are a checkpoint's, not safetensors."""
    return (Path(path) / MANIFEST).is_file()


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def checkpoints(directory: Path) -> list[Path]:
    """Directories with a training checkpoint's name, by step."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if directory.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def latest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint of the highest step in `directory`, or None, judged by the manifest and the files' sizes. Leftovers of an interrupted
    save and damaged ones are passed over."""
    for path in reversed(checkpoints(directory)):
        fault = size_fault(path)
        if fault is None:
            return path
        log.warning("%s is not used as a checkpoint: %s", path, fault)
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises DamagedCheckpointError where `path` is no whole checkpoint, CheckpointError for a format that is not known here. Looks at sizes,
    reads no weights."""
    fault = size_fault(path) if path.is_dir() else "there is no such directory"
    if fault is not None:
        raise DamagedCheckpointError(f"{path} is not a whole checkpoint: {fault}; take another one, such as the step before it")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") not in READABLE:
        raise CheckpointError(f"{path / MANIFEST} has format {manifest.get('format')}, this version reads {' and '.join(map(str, READABLE))}: "
                              "use the version of megatron_antisd that wrote it, or move the directory away to go on from an older checkpoint")
    return manifest


def write_manifest(directory: Path, manifest: Mapping[str, Any], files: Mapping[str, int], digests: Mapping[str, str]) -> None:
    """The last file of a checkpoint. `files`: size, `digests`: SHA-256 of every other one, by its path below `directory`."""
    whole = {**manifest, "format": FORMAT, "files": dict(sorted(files.items())), "sha256": dict(sorted(digests.items()))}
    write_json(directory / MANIFEST, {**whole, "digest": _digest(whole)})


def size_fault(path: Path) -> str | None:
    """Why this directory is no whole checkpoint, by its manifest and the sizes of its files; None where it is one."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(path / MANIFEST)
        files = {str(name): int(size) for name, size in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if manifest.get("format") not in READABLE:
        return None  # a newer version may count otherwise; `read_manifest` says so
    if "digest" in manifest or manifest["format"] != 1:
        digest = manifest.pop("digest", None)
        if digest != _digest(manifest):
            return f"{MANIFEST} is not as it was written: its digest differs"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
    return None


def content_fault(path: Path, digests: Mapping[str, str]) -> str | None:
    """Which file differs from what was written, by its SHA-256; None where none does. `digests`: of files below `path`, which are read whole."""
    for name, expected in digests.items():
        try:
            found = file_sha256(path / name)
        except OSError as error:
            return f"{name} cannot be read ({type(error).__name__}: {error})"
        if found != expected:
            return f"{name} is not as it was written: its SHA-256 is {found[:12]}..., expected {expected[:12]}..."
    return None


def model_fields(description: ModelDescription) -> dict[str, Any]:
    """What must agree between a checkpoint and the model that loads it."""
    fields = {key: value for key, value in sorted(description.hf.items()) if key not in _IGNORED_FIELDS and value is not None}
    return fields | {"rope": description.rope, "experts": description.experts}


def model_hash(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def check_model(path: Path, manifest: dict[str, Any], description: ModelDescription) -> None:
    """Raises CheckpointError that lists the fields in which the checkpoint's model is another one."""
    saved = manifest["model"] if "model" in manifest else model_fields(describe(path, 1))
    here, absent = model_fields(description), "(absent)"
    differing = [f"{key}: {saved.get(key, absent)!r} in the checkpoint, {here.get(key, absent)!r} here"
                 for key in sorted(saved.keys() | here.keys()) if saved.get(key, absent) != here.get(key, absent)]
    if differing:
        raise CheckpointError(f"{path} is a checkpoint of another model than model.path describes; nothing was loaded. Give the model it was trained "
                              "from as model.path, or another run.name. Differing fields:\n  " + "\n  ".join(differing))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
