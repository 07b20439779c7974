"""Rotary frequencies of a config.json, by kind of layer, as transformers computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"
Frequencies = tuple[torch.Tensor, float]
"""Inverse frequencies [head_dim / 2] float32, and the factor on cosine and sine (YaRN's attention factor)."""


def rope_parameters(hf: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its parameters, whichever way this config.json writes them."""
    return _by_kind(_config(hf))


def frequencies(hf: dict[str, Any]) -> dict[str, Frequencies]:
    """Kind of layer -> its frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = _config(hf)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {}
    for kind, parameters in _by_kind(config).items():
        if parameters["rope_type"] == "default":
            found[kind] = (parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0)
        else:
            nested = kind in config.rope_parameters
            found[kind] = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), layer_type=kind if nested else None)
    return found


def _config(hf: dict[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING  # here, not above: attention itself does without transformers

    return CONFIG_MAPPING[hf["model_type"]].from_dict(dict(hf))


def _by_kind(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    given = config.rope_parameters
    kinds = {kind: given[kind] for kind in (FULL, SLIDING) if given.get(kind)}
    return kinds or {FULL: given}
