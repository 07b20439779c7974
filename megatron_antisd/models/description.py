"""What a checkpoint directory says of its model: sizes, the table of weights, rotary parameters. Needs neither Megatron nor the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_antisd.config import ConfigError
from megatron_antisd.models.sizes import Sizes
from megatron_antisd.models.weight_map import Entry, Geometry, Layout, Shape, Weight, entries, split


class _Families(Mapping[str, ModuleType]):
    """Pages of this folder, imported when asked for: some need Megatron, which takes seconds."""

    _pages = {"qwen3": "qwen3", "qwen3_moe": "qwen3", "olmo3": "olmo3"}

    def __getitem__(self, model_type: str) -> ModuleType:
        return import_module(f"megatron_antisd.models.{self._pages[model_type]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._pages)

    def __len__(self) -> int:
        return len(self._pages)


FAMILIES = _Families()
"""model_type -> the page with its `fields`, `weights` and, where the layer is not Qwen3's, `specialise`."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a checkpoint directory says of its model, without weights."""

    hf: dict[str, Any]
    """The parsed config.json."""
    sizes: Sizes
    weights: tuple[Weight, ...]
    geometry: Geometry
    tied: bool

    @cached_property
    def rope(self) -> dict[str, dict[str, Any]]:
        """Kind of layer -> rotary parameters, as transformers names them."""
        from megatron_antisd.models.rotary import rope_parameters  # transformers takes seconds to import

        return rope_parameters(self.hf)

    @property
    def layers(self) -> int:
        return self.sizes.layers

    @property
    def experts(self) -> int | None:
        return self.sizes.experts

    def entries(self) -> Iterator[Entry]:
        """Every parameter of the whole model."""
        return entries(self.weights, self.layers, self.experts)

    def embedding(self) -> Entry:
        return next(entry for entry in self.entries() if entry.weight.layout is Layout.VOCAB)

    def shard_shape(self, entry: Entry, size: int) -> Shape:
        """Of one of `size` tensor-parallel ranks' Megatron parameter."""
        full = [torch.empty(shape, device="meta") for shape in entry.huggingface.values()]
        return tuple(split(entry.weight.layout, full, 0, size, self.geometry).shape)

    def huggingface_shapes(self) -> dict[str, Shape]:
        """Every tensor of the Hugging Face checkpoint."""
        return {name: shape for entry in self.entries() for name, shape in entry.huggingface.items()}

    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(math.prod(shape) for shape in self.huggingface_shapes().values())


def describe(model_dir: str | Path, tensor_parallel_size: int) -> ModelDescription:
    """Read `config.json`. Raises ConfigError when the family is not supported."""
    path = Path(model_dir) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path: no config.json in {model_dir}; expected a Hugging Face checkpoint directory")
    try:
        hf = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.path: {path} is not valid JSON: {error}") from error
    if not isinstance(hf, dict):
        raise ConfigError(f"model.path: {path} holds a {type(hf).__name__}, expected an object of settings")
    if hf.get("model_type") not in FAMILIES:
        raise ConfigError(f"model.path: model_type {hf.get('model_type')!r} is not supported; supported are {sorted(FAMILIES)}")
    try:
        sizes = Sizes.of(hf)
        weights = FAMILIES[hf["model_type"]].weights(hf)
    except KeyError as error:
        raise ConfigError(f"model.path: {path} lacks {error}, which a {hf['model_type']} model needs") from error
    return ModelDescription(
        hf=hf,
        sizes=sizes,
        weights=weights,
        geometry=Geometry(groups=sizes.groups, head_dim=sizes.head_dim, vocab_size=sizes.vocab,
                          padded_vocab_size=sizes.vocab + -sizes.vocab % tensor_parallel_size),
        tied=bool(hf.get("tie_word_embeddings", False)),
    )
