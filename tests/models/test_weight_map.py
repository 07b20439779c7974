"""Splitting and merging bitwise, and the family's table against the names that transformers itself writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_checkpoint, make_olmo3
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_antisd.models.build import FAMILIES, describe
from megatron_antisd.models.rotary import frequencies
from megatron_antisd.models.weight_map import Geometry, Layout, merge, split

HIDDEN, HEADS, GROUPS, DIM, VOCAB = 24, 8, 4, 5, 61
FULL: dict[Layout, tuple[tuple[int, ...], ...]] = {
    Layout.REPLICATED: ((HIDDEN,),),
    Layout.COLUMN: ((48, HIDDEN),),
    Layout.ROW: ((HIDDEN, 48),),
    Layout.VOCAB: ((VOCAB, HIDDEN),),
    Layout.QKV: ((HEADS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN)),
    Layout.GATED: ((32, HIDDEN), (32, HIDDEN)),
}


def geometry(size: int) -> Geometry:
    return Geometry(groups=GROUPS, head_dim=DIM, vocab_size=VOCAB, padded_vocab_size=VOCAB + -VOCAB % size)


def tensors(layout: Layout, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Every element another number."""
    shapes = FULL[layout]
    start, found = 0, []
    for shape in shapes:
        count = torch.Size(shape).numel()
        found.append(torch.arange(start, start + count).view(shape).to(dtype))
        start += count
    return found


def shards_of(layout: Layout, size: int) -> list[torch.Tensor]:
    return [split(layout, tensors(layout), rank, size, geometry(size)) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(layout: Layout, size: int, dtype: torch.dtype) -> None:
    given = tensors(layout, dtype)
    shards = [split(layout, given, rank, size, geometry(size)) for rank in range(size)]
    assert all(shard.is_contiguous() and shard.dtype == dtype for shard in shards)
    assert len({shard.shape for shard in shards}) == 1
    back = merge(layout, shards, geometry(size))
    assert len(back) == len(given)
    for mine, theirs in zip(back, given, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous() and torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_query_groups_stay_together(size: int) -> None:
    """Megatron's order: the query heads of a group, its key, its value; then the next group. Rank r holds groups r * n .. (r + 1) * n."""
    q, k, v = (t.view(-1, DIM, HIDDEN) for t in tensors(Layout.QKV))
    per_group = HEADS // GROUPS
    expected = [block for g in range(GROUPS) for block in (*q[g * per_group : (g + 1) * per_group], k[g], v[g])]
    assert torch.equal(torch.cat(shards_of(Layout.QKV, size)), torch.cat(expected))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_has_its_gate_above_its_up(size: int) -> None:
    gate, up = tensors(Layout.GATED)
    for rank, shard in enumerate(shards_of(Layout.GATED, size)):
        mine = slice(rank * 32 // size, (rank + 1) * 32 // size)
        assert torch.equal(shard, torch.cat([gate[mine], up[mine]]))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_columns_and_copies(size: int) -> None:
    (column,), (row,) = tensors(Layout.COLUMN), tensors(Layout.ROW)
    assert torch.equal(torch.cat(shards_of(Layout.COLUMN, size)), column)
    assert torch.equal(torch.cat(shards_of(Layout.ROW, size), dim=1), row)
    assert all(torch.equal(shard, tensors(Layout.REPLICATED)[0]) for shard in shards_of(Layout.REPLICATED, size))


def test_vocabulary_padding_is_zeros_at_the_end_and_comes_off_again() -> None:
    shards = shards_of(Layout.VOCAB, 4)
    assert [shard.shape[0] for shard in shards] == [16] * 4
    assert torch.equal(shards[-1][-3:], torch.zeros(3, HIDDEN))
    shards[-1][-3:] = 7.0  # whatever the padding holds: it is no part of the model
    assert torch.equal(merge(Layout.VOCAB, shards, geometry(4))[0], tensors(Layout.VOCAB)[0])


def test_a_shard_owns_its_memory_where_it_is_a_part() -> None:
    """A shard that is a view would keep the full tensor of a large model alive."""
    full = tensors(Layout.COLUMN)
    shard = split(Layout.ROW, full, 0, 2, geometry(2))
    assert shard.untyped_storage().nbytes() == shard.nbytes


@pytest.mark.parametrize(("layout", "size"), [(Layout.COLUMN, 5), (Layout.ROW, 5), (Layout.QKV, 3), (Layout.GATED, 3)])
def test_sizes_that_do_not_divide_are_refused(layout: Layout, size: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot be divided over {size} ranks"):
        split(layout, tensors(layout), 0, size, geometry(1))


def expected_on_disk(names: set[str], experts: int) -> set[str]:
    """transformers holds a layer's experts fused in memory and writes them one by one."""
    found = set()
    for name in names:
        prefix, separator, projection = name.partition(".experts.")
        if not separator:
            found.add(name)
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
        found |= {f"{prefix}.experts.{expert}.{part}.weight" for expert in range(experts) for part in parts}
    return found


def table_names(hf: dict[str, Any]) -> list[str]:
    """Every Hugging Face name of the table, layers and experts written out."""
    experts = hf.get("num_experts") or hf.get("num_local_experts") or 0
    names = []
    for weight in FAMILIES[hf["model_type"]].weights(hf):
        for name in weight.huggingface:
            layers = range(hf["num_hidden_layers"]) if "{layer}" in name else (None,)
            names += [name.format(layer=layer, expert=expert) for layer in layers for expert in (range(experts) if weight.expert else (None,))]
    return names


def meta_names(hf: dict[str, Any]) -> set[str]:
    fields = {key: value for key, value in hf.items() if key not in ("architectures", "transformers_version", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(hf["model_type"], **fields))
    tied = {"lm_head.weight"} if hf.get("tie_word_embeddings") else set()
    return expected_on_disk(set(model.state_dict()) - tied, hf.get("num_experts") or 0)


@pytest.mark.parametrize(("moe", "tied"), [(True, False), (True, True), (False, False), (False, True)])
def test_table_names_what_transformers_writes(tmp_path: Path, moe: bool, tied: bool) -> None:
    checkpoint = make_checkpoint(tmp_path, moe=moe, tied=tied)
    hf = json.loads((checkpoint / "config.json").read_text())
    names = table_names(hf)
    assert len(set(names)) == len(names)
    assert set(names) == set(load_file(checkpoint / "model.safetensors"))
    assert set(names) == meta_names({**hf, "num_experts": hf.get("num_experts") or hf.get("num_local_experts")} if moe else hf), \
        "the expansion of fused names below stands on this"


def test_olmo3s_table_names_what_transformers_writes(tmp_path: Path) -> None:
    checkpoint = make_olmo3(tmp_path)
    names = table_names(json.loads((checkpoint / "config.json").read_text()))
    assert len(set(names)) == len(names) and set(names) == set(load_file(checkpoint / "model.safetensors"))


def test_olmo3s_table_names_all_weights_at_full_size() -> None:
    """transformers' defaults are OLMo-3 7B's shape."""
    hf = AutoConfig.for_model("olmo3").to_dict()
    assert (hf["hidden_size"], hf["num_hidden_layers"], hf["intermediate_size"], hf["sliding_window"]) == (4096, 32, 11008, 4096)
    assert set(table_names(hf)) == meta_names(hf)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotary_frequencies_are_transformers_own(tmp_path: Path, theta: float) -> None:
    """Bitwise those of its model's buffers, each kind of layer, YaRN's factor included; and YaRN for Qwen3, as its model card sets it."""
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": theta}
    config = AutoConfig.for_model("olmo3", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, vocab_size=32,
                                  rope_parameters={"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": theta}})
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    found = frequencies(config.to_dict())
    for kind in ("full_attention", "sliding_attention"):
        torch.testing.assert_close(found[kind][0], getattr(rotary, f"{kind}_inv_freq"), rtol=1e-6, atol=0)
        assert found[kind][1] == getattr(rotary, f"{kind}_attention_scaling")
    assert found["full_attention"][1] > 1.2 and not torch.equal(found["full_attention"][0], found["sliding_attention"][0])

    path = make_checkpoint(tmp_path, moe=False, rope_parameters={**yarn, "factor": 4.0})
    rotary = AutoModelForCausalLM.from_pretrained(path).model.rotary_emb
    ((kind, (inverse, scale)),) = frequencies(describe(path, 1).hf).items()
    torch.testing.assert_close(inverse, rotary.inv_freq, rtol=1e-6, atol=0)
    assert kind == "full_attention" and scale == rotary.attention_scaling


def real_configs() -> list[Path]:
    folder = os.environ.get("ANTISD_DATA")
    return sorted([*Path(folder).glob("configs/*.json"), *Path(folder).glob("tokenizer/*/config.json")]) if folder else []


@pytest.mark.skipif(not real_configs(), reason="ANTISD_DATA is not set, or holds no configs")
def test_table_names_all_weights_of_published_models() -> None:
    seen = set()
    for path in real_configs():
        hf = json.loads(path.read_text())
        if hf.get("model_type") not in ("qwen3", "qwen3_moe"):
            continue
        names = table_names(hf)
        assert len(set(names)) == len(names), path
        assert set(names) == meta_names(hf), path
        seen.add(hf["model_type"])
    assert seen == {"qwen3", "qwen3_moe"}
