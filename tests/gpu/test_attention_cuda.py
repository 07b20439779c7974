"""Packed attention on a GPU, with continuations and grouped queries, against float64 on the CPU. Needs torch and megatron-core alone."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny import Groups

from megatron_antisd.models.attention import PackedAttention, PackedRotary, PackedSequences
from megatron_antisd.models.rotary import FULL

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE = "cuda"
HEADS, DIM = 8, 64
Continues = list[int | None]
# Trunks of equal and of other lengths, a trunk alone, tails of one token and tails longer than their trunk.
CASES: dict[str, tuple[list[int], Continues]] = {
    "separate": ([130, 1, 64, 57, 129], [None] * 5),
    "continued": ([100, 37, 1, 64, 100, 40, 20, 33, 90], [None, 0, 0, None, None, 4, None, 6, 6]),
}


def oracle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], lengths: list[int],
           continues: Continues) -> torch.Tensor:
    """[T, 1, heads * d] in float64, one sequence at a time: rotation as a product of complex numbers, a softmax over every visible token."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        product = torch.complex(*x[:, 0].chunk(2, dim=-1)) * torch.complex(*rotation)
        return torch.cat([product.real, product.imag], dim=-1)

    repeats = query.shape[2] // key.shape[2]
    q, k, v = turned(query), turned(key).repeat_interleave(repeats, dim=1), value[:, 0].repeat_interleave(repeats, dim=1)
    starts, outputs = [sum(lengths[:i]) for i in range(len(lengths))], []
    for start, length, parent in zip(starts, lengths, continues, strict=True):
        own = torch.arange(start, start + length)
        seen = own if parent is None else torch.cat([torch.arange(starts[parent], starts[parent] + lengths[parent]), own])
        scores = torch.einsum("ihd,jhd->hij", q[own], k[seen]) * DIM**-0.5
        hidden = torch.ones(length, len(seen), dtype=torch.bool).triu(len(seen) - length + 1)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[seen]))
    return torch.cat(outputs).flatten(1)[:, None]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_as_float64(case: str, groups: int, dtype: torch.dtype, tolerance: float) -> None:
    lengths, continues = CASES[case]
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    # The oracle starts from the rounded inputs and the rounded rotary tables: only the arithmetic is compared.
    drawn = [torch.randn(total, 1, heads, DIM, generator=generator).to(dtype) for heads in (HEADS, groups, groups)]
    direction = torch.randn(total, 1, HEADS * DIM, generator=generator).to(dtype)
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=groups, kv_channels=DIM)
    attention = PackedAttention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=Groups())
    packed = PackedSequences.of(lengths, DEVICE, continues=continues)
    PackedRotary({FULL: (10_000.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float32) / DIM), 1.0)}, dtype)(packed)

    ours = [x.to(DEVICE).requires_grad_() for x in drawn]
    out = attention(*ours, packed_seq_params=packed)
    found = torch.autograd.grad(out, ours, direction.to(DEVICE))
    theirs = [x.double().requires_grad_() for x in drawn]
    expected = oracle(*theirs, tuple(table.double().cpu() for table in packed.rotation[FULL]), lengths, continues)
    wanted = torch.autograd.grad(expected, theirs, direction.double())
    assert out.dtype == dtype and out.shape == expected.shape
    for name, mine, exact in zip(("output", "query", "key", "value"), (out, *found), (expected, *wanted), strict=True):
        error = (mine.detach().double().cpu() - exact).norm() / exact.norm()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
