"""A checkpoint as files: which directories are whole, what the manifest says, and how files get to disk for good.

A training checkpoint and one converted from Hugging Face (`kind` "weights") differ only in what they hold besides the weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from megatron_antisd.models.description import ModelDescription, describe

FORMAT = 1
WEIGHTS_ONLY = "weights"
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


def is_checkpoint(path: str | Path) -> bool:
    """Whether a model directory's weights are a checkpoint's, not safetensors."""
    return (Path(path) / "manifest.json").is_file()


def checkpoints(directory: Path) -> list[Path]:
    """Directories with a training checkpoint's name, by step."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()] if directory.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def latest_checkpoint(directory: Path) -> Path | None:
    """The whole checkpoint of the highest step in `directory`, or None. Leftovers of an interrupted save and damaged ones are passed over."""
    for path in reversed(checkpoints(directory)):
        fault = _fault(path)
        if fault is None:
            return path
        log.warning("%s is not used as a checkpoint: %s", path, fault)
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where `path` is no whole checkpoint of this format. Looks at sizes, reads no weights."""
    fault = _fault(path) if path.is_dir() else "there is no such directory"
    if fault is not None:
        raise CheckpointError(f"{path} is not a whole checkpoint: {fault}; take another one, such as the step before it")
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')}, this version reads format {FORMAT}")
    return manifest


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
        raise CheckpointError(f"{path} is a checkpoint of another model than model.path describes; nothing was loaded. Differing fields:\n  "
                              + "\n  ".join(differing))


def file_sizes(directory: Path) -> dict[str, int]:
    """Every file by its path below `directory`, as the manifest lists them."""
    return {str(file.relative_to(directory)): file.stat().st_size for file in sorted(directory.rglob("*")) if file.is_file()}


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _fault(path: Path) -> str | None:
    """Why this directory is no whole checkpoint; None where it is one."""
    if not (path / "manifest.json").is_file():
        return "it has no manifest.json"
    try:
        files = dict(read_json(path / "manifest.json")["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({type(error).__name__}: {error})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, expected {size}"
    return None
