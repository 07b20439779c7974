"""What transformer-engine's layers call the parameters, without the package: against names written out here, and against Megatron-Core's own specs.

Megatron-Core says which class stands where (`get_gpt_layer_with_transformer_engine_spec` runs on stand-ins of transformer-engine's classes) and what
it reads from their state dicts; attributes have the names of the spec's fields.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import megatron.core.extensions.transformer_engine as extension
import megatron.core.extensions.transformer_engine_spec_provider as provider
import pytest
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_antisd.models.build import FAMILIES
from megatron_antisd.models.transformer_engine import layer_spec, parameter_name

SIZES = dict(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=61, intermediate_size=96)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": SIZES | dict(model_type="qwen3"),
    "qwen3_moe": SIZES | dict(model_type="qwen3_moe", num_experts=4, moe_intermediate_size=48),
    "olmo3": SIZES | dict(model_type="olmo3"),
}
LAYER = "decoder.layers.{layer}."
ENDS = {name: name for name in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")}
ATTENTION = {f"{LAYER}self_attention.{name}": f"{LAYER}self_attention.{name}" for name in (
    "linear_qkv.weight", "q_layernorm.weight", "k_layernorm.weight", "linear_proj.weight")}
MLP = {f"{LAYER}mlp.{name}": f"{LAYER}mlp.{name}" for name in ("linear_fc1.weight", "linear_fc2.weight")}
FIRST_NORM = {LAYER + "input_layernorm.weight": LAYER + "self_attention.linear_qkv.layer_norm_weight"}
TABLES: dict[str, dict[str, str]] = {
    "qwen3": ENDS | ATTENTION | MLP | FIRST_NORM | {LAYER + "pre_mlp_layernorm.weight": LAYER + "mlp.linear_fc1.layer_norm_weight"},
    "qwen3_moe": ENDS | ATTENTION | FIRST_NORM | {
        LAYER + "pre_mlp_layernorm.weight": LAYER + "pre_mlp_layernorm.weight",
        LAYER + "mlp.router.weight": LAYER + "mlp.router.weight",
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc1.weight": LAYER + "mlp.experts.linear_fc1.weight{expert}",
        LAYER + "mlp.experts.local_experts.{expert}.linear_fc2.weight": LAYER + "mlp.experts.linear_fc2.weight{expert}"},
    "olmo3": ENDS | ATTENTION | MLP | {
        f"{LAYER}{name}.norm.weight": f"{LAYER}{name}.norm.weight" for name in ("self_attention.linear_proj", "mlp.linear_fc2")},
}

# The parameters of the classes that a layer spec may name, as Megatron-Core's extension reads them.
PARAMETERS = {
    "TENorm": ["weight"],
    "TELayerNormColumnParallelLinear": ["layer_norm_weight", "weight"],
    "TEColumnParallelLinear": ["weight"],
    "TERowParallelLinear": ["weight"],
    "TEColumnParallelGroupedLinear": ["weight{expert}"],
    "TERowParallelGroupedLinear": ["weight{expert}"],
    "TopKRouter": ["weight"],
    "QueryNorm": ["weight"],
    "KeyNorm": ["weight"],
    "NormedRowParallelLinear": ["weight", "norm.weight"],
    "PackedAttention": [],
    "IdentityOp": [],
    "IdentityFuncOp": [],
}


def named(family: str) -> dict[str, str]:
    """Name in the weight table -> name in transformer-engine's layers."""
    config = CONFIGS[family]
    return {weight.megatron: parameter_name(weight.megatron, moe="num_experts" in config) for weight in FAMILIES[family].weights(config)}


def test_every_family_has_a_table_here() -> None:
    assert TABLES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TABLES)
def test_names_are_those_of_the_table(family: str) -> None:
    found = named(family)
    assert found == TABLES[family]
    assert len(set(found.values())) == len(found) == len(FAMILIES[family].weights(CONFIGS[family])), "two rows of one name"


@pytest.fixture
def with_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core as it is where a recent transformer-engine is installed, as far as building a layer spec goes."""
    for name in PARAMETERS:
        if name.startswith("TE"):
            stand_in = type(name, (), {})
            for module in (provider, extension):
                monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(provider, "is_te_min_version", lambda *_: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)


def parameters(part: Any) -> Iterator[str]:
    """The parameters below a part of a layer spec; a shared expert is not built unless the config asks for it."""
    if isinstance(part, ModuleSpec) and part.submodules is None:
        part = part.module
    if isinstance(part, ModuleSpec):
        for field in dataclasses.fields(part.submodules):
            inner = getattr(part.submodules, field.name)
            if field.name != "shared_experts" and isinstance(inner, type | ModuleSpec):
                yield from (f"{field.name}.{name}" for name in parameters(inner))
    else:
        yield from PARAMETERS[part.__name__]


@pytest.mark.parametrize("family", TABLES)
def test_names_are_those_of_megatrons_spec(with_stand_ins: None, family: str) -> None:
    spec = layer_spec(CONFIGS[family].get("num_experts"))
    specialise = getattr(FAMILIES[family], "specialise", None)
    if specialise is not None:
        specialise(spec, "te")
    expected = {LAYER + inner for inner in parameters(spec)}
    assert {theirs for theirs in named(family).values() if theirs.startswith(LAYER)} == expected


def test_joined_norms_are_those_of_megatrons_checkpoints() -> None:
    """Its torch-only layer writes its norms under the names that transformer-engine's layer has."""
    renamed = gpt_layer_specs.get_gpt_layer_local_spec(qk_layernorm=True).submodules.sharded_state_dict_keys_map
    found = {ours: theirs for ours, theirs in named("qwen3").items() if ours != theirs}
    assert found == {f"{LAYER}{ours}weight": f"{LAYER}{theirs}weight" for ours, theirs in renamed.items()}


def test_megatron_reads_the_parameters_that_the_classes_are_said_to_have() -> None:
    source = inspect.getsource(extension)
    assert "fused_layer.layer_norm_weight" in source and "norm_layer.weight.copy_" in source
    assert 'full_state_dict[f"weight{gemm_idx}"]' in source
