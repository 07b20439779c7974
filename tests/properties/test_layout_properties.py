"""Layouts over drawn models and sizes: what `check_layout` accepts is what the arithmetic written down here a second time allows, and a broken
config.json is explained rather than tripped over."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_antisd.config import ConfigError, RunConfig, build_config
from megatron_antisd.config.rollout_rules import VLLM_CPU_HEAD_SIZES
from megatron_antisd.config.rules import check_layout, check_model, data_parallel_size

SIZE = st.sampled_from([1, 1, 1, 2, 2, 2, 3, 4])
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "max_position_embeddings", "vocab_size", "num_experts", "moe_intermediate_size")


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["qwen3", "qwen3_moe", "olmo3"]))
    groups = draw(st.sampled_from([4, 2, 12, 1]))
    model = {
        "model_type": kind, "hidden_size": draw(st.sampled_from([48, 64, 96])), "intermediate_size": draw(st.sampled_from([48, 128])),
        "num_hidden_layers": draw(st.sampled_from([2, 4, 4, 7, 8])),
        "num_attention_heads": draw(st.sampled_from([groups, 2 * groups, 3 * groups, 6])),
        "num_key_value_heads": groups, "head_dim": draw(st.sampled_from([16, 32])), "max_position_embeddings": 512, "vocab_size": 512}
    if kind == "qwen3_moe":
        model |= {"num_experts": draw(st.sampled_from([4, 6, 8])), "moe_intermediate_size": draw(st.sampled_from([32, 48])), "norm_topk_prob": True}
    return model


@st.composite
def plans(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A configuration and a number of ranks: anything, or powers of two that most models can be divided by."""
    wild = draw(st.booleans())
    size = SIZE if wild else st.sampled_from([1, 2])
    tp, pp, cp = draw(size), draw(size), draw(size)
    vpp = draw(st.sampled_from([1, 1, 2])) if wild or pp > 1 else 1
    parallel: dict[str, Any] = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "context_parallel_size": cp, "virtual_pipeline_size": vpp}
    rollout: dict[str, Any] = {"engine": draw(st.sampled_from(["vllm", "megatron"])), "problems_per_step": 8, "group_size": 4, "max_new_tokens": 64}
    if wild:
        parallel |= {"expert_parallel_size": draw(SIZE), "expert_tensor_parallel_size": draw(st.sampled_from([1, 1, 2]))}
        if draw(st.booleans()):
            parallel["pipeline_layers"] = draw(st.lists(st.integers(0, 4), max_size=4) | st.just([1] * (pp * vpp)))
        rollout |= {"tensor_parallel_size": draw(SIZE), "problems_per_step": draw(st.sampled_from([2, 6, 8])),
                    "group_size": draw(st.sampled_from([2, 3, 4])), "max_new_tokens": draw(st.sampled_from([64, 256])),
                    "max_context": draw(st.sampled_from([None, 256, 1024]))}
    config = build_config({"model": {"path": "m"}, "parallel": parallel, "rollout": rollout,
                           "algorithm": {"updates_per_batch": draw(st.sampled_from([1, 1, 2]))}})
    return config, draw(st.just(tp * pp * cp) | st.just(2 * tp * pp * cp) | st.integers(1, 16))


def fits(config: RunConfig, model: dict[str, Any], world: int, cpu: bool) -> bool:
    """Written for clearness: every quotient that must be whole is asked for by itself."""
    p, rollout = config.parallel, config.rollout
    tp, pp, cp, vpp, ep, etp = (p.tensor_parallel_size, p.pipeline_parallel_size, p.context_parallel_size, p.virtual_pipeline_size,
                                p.expert_parallel_size, p.expert_tensor_parallel_size)
    heads, groups, layers = model["num_attention_heads"], model["num_key_value_heads"], model["num_hidden_layers"]
    moe = model["model_type"] == "qwen3_moe"
    if world % (tp * pp * cp) or world % (ep * etp * pp):
        return False
    replicas = world // (tp * pp * cp)
    given_layers = p.pipeline_layers
    context = rollout.max_context or model["max_position_embeddings"]
    trained = [
        vpp == 1 or pp > 1,
        heads % tp == groups % tp == heads % groups == 0,
        model["hidden_size"] % tp == model["intermediate_size"] % tp == 0,
        pp * vpp <= layers if given_layers is None else len(given_layers) == pp * vpp and sum(given_layers) == layers and all(given_layers),
        model["num_experts"] % ep == model["moe_intermediate_size"] % etp == 0 if moe else ep == etp == 1,
        rollout.problems_per_step * rollout.group_size // config.algorithm.updates_per_batch % replicas == 0,
        context <= model["max_position_embeddings"] and rollout.max_new_tokens < context,
    ]
    engine, width = rollout.tensor_parallel_size, model["moe_intermediate_size" if moe else "intermediate_size"]
    generated = rollout.engine == "megatron" or all([
        world % engine == heads % engine == width % engine == 0,
        groups % engine == 0 or engine % groups == 0,
        not moe or engine <= model["num_experts"],
        not cpu or model["head_dim"] in VLLM_CPU_HEAD_SIZES,
    ])
    return all(trained) and generated


@settings(max_examples=400)
@given(plan=plans(), model=models(), cpu=st.booleans())
def test_accepted_layouts_are_those_that_the_arithmetic_allows(plan: tuple[RunConfig, int], model: dict[str, Any], cpu: bool) -> None:
    config, world = plan
    if not fits(config, model, world, cpu):
        with pytest.raises(ConfigError, match="cannot run"):
            check_layout(config, model, world, cpu=cpu)
        return
    check_layout(config, model, world, cpu=cpu)
    p = config.parallel
    replicas = data_parallel_size(config, world)
    assert replicas * p.tensor_parallel_size * p.pipeline_parallel_size * p.context_parallel_size == world
    chunks = p.chunk_layers(model["num_hidden_layers"])
    assert sum(chunks) == model["num_hidden_layers"] and min(chunks) >= 1 and len(chunks) == p.pipeline_parallel_size * p.virtual_pipeline_size


def test_layouts_that_fit_are_among_the_drawn_ones() -> None:
    """Or the test above shows only refusals."""
    found = 0

    @settings(max_examples=400)
    @given(plan=plans(), model=models(), cpu=st.booleans())
    def count(plan: tuple[RunConfig, int], model: dict[str, Any], cpu: bool) -> None:
        nonlocal found
        found += fits(plan[0], model, plan[1], cpu) and plan[1] > 1

    count()
    assert found >= 15, found


@given(layers=st.integers(1, 200), stages=st.integers(1, 12), virtual=st.integers(1, 4))
def test_layers_are_divided_as_evenly_as_it_goes(layers: int, stages: int, virtual: int) -> None:
    config = build_config({"model": {"path": "m"}, "parallel": {"pipeline_parallel_size": stages, "virtual_pipeline_size": virtual}})
    chunks = config.parallel.chunk_layers(layers)
    assert sum(chunks) == layers and max(chunks) - min(chunks) <= 1 and list(chunks) == sorted(chunks, reverse=True)


JUNK = st.none() | st.booleans() | st.integers(-4, 8) | st.floats(-2, 8) | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({})
JUNK_ELSEWHERE = ("rope_parameters", "rope_scaling", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "attention_bias", "model_type",
                  "num_local_experts", "use_sliding_window")


@settings(max_examples=300)
@given(plan=plans(), model=models(), junk=st.dictionaries(st.sampled_from([*NUMBERS, *JUNK_ELSEWHERE]), JUNK, min_size=1, max_size=2))
@example(plan=(build_config({"model": {"path": "m"}}), 1), model={}, junk={"model_type": "olmo3", "num_attention_heads": 0, "hidden_size": 4})
def test_a_broken_model_description_is_explained(plan: tuple[RunConfig, int], model: dict[str, Any], junk: dict[str, Any]) -> None:
    config, world = plan
    broken = model | junk
    numbers = [key for key in NUMBERS if key in junk and (key in model or broken["model_type"] == "qwen3_moe")]
    left_out = ("num_key_value_heads", "head_dim") if broken["model_type"] == "olmo3" else ()  # then they have a default
    for check in (lambda: check_layout(config, broken, world), lambda: check_model(config.parallel, broken)):
        try:
            check()
        except ConfigError:
            continue
        assert all(type(junk[key]) is int and junk[key] > 0 for key in numbers if key not in left_out), "a size that is none was accepted"
