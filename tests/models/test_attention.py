"""Packed attention against attention written out with a softmax, one sequence at a time: values, gradients, decoding with a cache.

Float64 throughout, so the tolerances are rounding of 1e-16 times the size of the sums.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny import Groups

from megatron_antisd.models.attention import KeyValueCache, PackedAttention, PackedRotary, PackedSequences
from megatron_antisd.models.rotary import FULL, SLIDING, Frequencies

HEADS, GROUPS, DIM = 4, 2, 8
VALUE, GRADIENT = 1e-12, 1e-11

Continues = list[int | None]
# Two trunks of equal length and one of another, a trunk alone, tails of one token; tails that do not stand behind their trunk.
CONTINUED: list[tuple[list[int], Continues]] = [
    ([4, 3], [None, 0]), ([5, 1, 6, 6], [None, 0, 0, 0]), ([9, 2, 7, 9, 4, 30, 1, 1, 3], [None, 0, 0, None, 3, None, 5, None, 0])]
LENGTHS = [[1], [5], [1, 1, 1], [7, 1, 30, 2], [3, 3, 3, 3], [1, 40, 39, 2, 2, 17, 1], [64, 5, 9, 33, 12, 12, 50]]


def build(window: int | None) -> PackedAttention:
    """Layer 3 of 4; with a window that is a sliding layer, of which layer 4 is none."""
    sliding = {} if window is None else {"window_size": (window - 1, 0), "window_attn_skip_freq": [1, 1, 1, 0]}
    config = TransformerConfig(num_layers=4, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=DIM,
                               attention_softmax_in_fp32=True, **sliding)
    layer = PackedAttention(config, layer_number=3, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=Groups())
    assert layer.softmax_scale == pytest.approx(DIM**-0.5)
    assert (layer.kind, layer.window) == (FULL if window is None else SLIDING, window)
    full = PackedAttention(config, layer_number=4, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=Groups())
    assert (full.kind, full.window) == (FULL, None)
    return layer


@pytest.fixture(scope="module")
def attention() -> PackedAttention:
    return build(None)


def one_kind(base: float, dim: int) -> dict[str, Frequencies]:
    return {FULL: (base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim), 1.0)}


def packing(lengths: list[int], continues: Continues | None = None) -> PackedSequences:
    """Laid out, and turned by no angle."""
    packed = PackedSequences.of(lengths, continues=continues)
    none = (torch.ones(sum(lengths), 1, DIM // 2, dtype=torch.float64), torch.zeros(sum(lengths), 1, DIM // 2, dtype=torch.float64))
    packed.rotation = {FULL: none, SLIDING: none}
    return packed


def draw(total: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(total, 1, heads, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float,
          continues: Continues | None = None, window: int | None = None) -> torch.Tensor:
    """[T, 1, heads * d]: every head of every token of every sequence on its own."""
    rows, start, total = [], 0, len(query)
    for length, parent in zip(lengths, continues or [None] * len(lengths), strict=True):
        trunk = [] if parent is None else list(range(sum(lengths[:parent]), sum(lengths[: parent + 1])))
        for t in range(length):
            seen = (trunk + list(range(start, start + t + 1)))[-(window or total):]
            heads = []
            for head in range(query.shape[2]):
                group = head * key.shape[2] // query.shape[2]
                weight = (key[seen, 0, group] @ query[start + t, 0, head] * scale).softmax(0)
                heads.append(weight @ value[seen, 0, group])
            rows.append(torch.cat(heads))
        start += length
    return torch.stack(rows)[:, None]


@pytest.mark.parametrize("groups", [HEADS, GROUPS, 1])
@pytest.mark.parametrize(("lengths", "continues"), [*((lengths, None) for lengths in LENGTHS), *CONTINUED], ids=str)
def test_values_and_gradients_are_those_of_separate_sequences(attention: PackedAttention, lengths: list[int], continues: Continues | None,
                                                              groups: int) -> None:
    total = sum(lengths)
    inputs = [draw(total, heads, seed).requires_grad_() for seed, heads in enumerate((HEADS, groups, groups))]
    packed = packing(lengths, continues=continues)
    out = attention(*inputs, packed_seq_params=packed)
    expected = naive(*inputs, lengths, attention.softmax_scale, continues)
    assert out.shape == expected.shape == (total, 1, HEADS * DIM)
    assert (out - expected).abs().max() < VALUE
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for mine, theirs in zip(torch.autograd.grad((out * direction).sum(), inputs), torch.autograd.grad((expected * direction).sum(), inputs),
                            strict=True):
        assert (mine - theirs).abs().max() < GRADIENT


@pytest.mark.parametrize("window", [1, 2, 5, 16, 64])
@pytest.mark.parametrize(("lengths", "continues"), [([7, 1, 30, 2], None), ([64, 5, 9, 33], None), *CONTINUED], ids=str)
def test_a_window_shows_the_last_tokens_and_no_others(lengths: list[int], continues: Continues | None, window: int) -> None:
    """Values and gradients, also over the border between a trunk and what continues it, and where blocks of queries end unevenly."""
    layer = build(window)
    inputs = [draw(sum(lengths), heads, seed).requires_grad_() for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
    out = layer(*inputs, packed_seq_params=packing(lengths, continues))
    expected = naive(*inputs, lengths, layer.softmax_scale, continues, window)
    assert (out - expected).abs().max() < VALUE
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for mine, theirs in zip(torch.autograd.grad((out * direction).sum(), inputs), torch.autograd.grad((expected * direction).sum(), inputs),
                            strict=True):
        assert (mine - theirs).abs().max() < GRADIENT


def test_a_sequence_does_not_depend_on_its_neighbours(attention: PackedAttention) -> None:
    """Bitwise: other contents beside it change nothing."""
    lengths = [6, 11, 3]
    tensors = [draw(20, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
    before = attention(*tensors, packed_seq_params=packing(lengths))
    for tensor in tensors:
        tensor[:6] = float("inf")
        tensor[17:] = -1e9
    after = attention(*tensors, packed_seq_params=packing(lengths))
    assert torch.equal(before[6:17], after[6:17])


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_decoding_with_a_cache_gives_the_packed_values(lengths: list[int], window: int | None) -> None:
    """Prompts of uneven length enter as one packed row, then the sequences grow token by token until each is at its end.
    Slots are taken in another order than the sequences stand in, and one slot holds a longer, earlier sequence's leftovers."""
    attention = build(window)
    total, starts = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths))]
    query, key, value = (draw(total, heads, seed) for seed, heads in enumerate((HEADS, GROUPS, GROUPS)))
    expected = attention(query, key, value, packed_seq_params=packing(lengths))
    cache = KeyValueCache(slots=len(lengths) + 1, capacity=max(lengths) + 2)
    slots = list(reversed(range(len(lengths))))
    for stale in cache.of(attention.layer_number, key):
        stale.fill_(1e6)  # what an earlier sequence left must never be seen; finite, as real leftovers are

    prompts = [max(1, length // 2) for length in lengths]
    rows = torch.cat([torch.arange(s, s + p) for s, p in zip(starts, prompts, strict=True)])
    packed = packing(prompts)
    packed.cache, packed.slot = cache, torch.cat([torch.full((p,), slot) for slot, p in zip(slots, prompts, strict=True)])
    found = torch.empty_like(expected)
    found[rows] = attention(query[rows], key[rows], value[rows], packed_seq_params=packed)
    for step in range(max(lengths)):
        running = [i for i, length in enumerate(lengths) if prompts[i] + step < length]
        if not running:
            break
        rows = torch.tensor([starts[i] + prompts[i] + step for i in running])
        filled = torch.cat([rows, rows[:1]])  # padding of the row: its token belongs to no slot and must not be remembered
        packed = PackedSequences.decoding([*(prompts[i] + step for i in running), 0], [*(slots[i] for i in running), -1], cache)
        packed.rotation = packing([1] * len(filled)).rotation
        found[rows] = attention(query[filled], key[filled], value[filled], packed_seq_params=packed)[:-1]
    assert (found - expected).abs().max() < VALUE
    assert (cache.layers[attention.layer_number][0][-1] == 1e6).all(), "a slot nobody owns was written"


def test_layers_have_separate_caches() -> None:
    cache = KeyValueCache(slots=2, capacity=4)
    first, second = cache.of(1, draw(1, GROUPS, 0)[:, 0]), cache.of(2, draw(1, GROUPS, 0)[:, 0])
    assert first[0].shape == (2, GROUPS, 4, DIM) and first[0].dtype == torch.float64
    assert first[0] is cache.of(1, draw(1, GROUPS, 0)[:, 0])[0]
    assert len({t.data_ptr() for t in (*first, *second)}) == 4


@pytest.mark.parametrize("waste", [0.0, 0.1, 0.25, 0.6])
def test_layout_of_random_lengths(waste: float) -> None:
    """Padding stays below the bound in every batch, each token stands in exactly one place, and it is found again there."""
    generator = random.Random(1)
    for _ in range(100):
        lengths = [generator.choice((1, 2, generator.randint(1, 9), generator.randint(1, 300))) for _ in range(generator.randint(1, 25))]
        packed = PackedSequences.of(lengths, waste=waste)
        assert packed.positions.tolist() == [t for n in lengths for t in range(n)], "positions restart with every sequence"
        queries = [batch.query for batch in packed.batches]
        flat = torch.cat([index.flatten() for index in queries])
        assert torch.equal(flat[packed.unpack], torch.arange(sum(lengths)))
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        for index in queries:
            assert torch.equal(sequence[index], sequence[index[:, :1]].expand_as(index)), "a row of a batch holds one sequence"
            real = sum(len(set(row)) for row in index.tolist())
            assert index.numel() - real <= waste * index.numel() + 1e-9
        assert sum(len(index) for index in queries) == len(lengths)


def test_similar_lengths_share_a_batch() -> None:
    def shapes(lengths: list[int], continues: Continues | None = None) -> list[tuple[int, ...]]:
        return [tuple(batch.query.shape) for batch in PackedSequences.of(lengths, continues=continues).batches]

    assert shapes([100, 90, 80, 95]) == [(4, 100)]
    assert shapes([100, 1]) == [(1, 1), (1, 100)]
    assert shapes([50, 10, 9, 50, 10], [None, 0, 0, None, 3]) == [(2, 50), (3, 10)], "tails of equally long trunks stand together"


def test_a_continuation_has_the_positions_behind_its_trunk() -> None:
    packed = PackedSequences.of([4, 2, 3, 2], continues=[None, 0, 0, None])
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 0, 1]
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 7


def test_rotation_is_that_of_the_position_in_the_sequence() -> None:
    lengths, base = [3, 1, 5], 10_000.0
    packed = PackedSequences.of(lengths)
    assert PackedRotary(one_kind(base, DIM), torch.float32)(packed) is None
    assert all(table.shape == (9, 1, DIM // 2) and table.dtype == torch.float32 for table in packed.rotation[FULL])
    for token, position in enumerate(t for n in lengths for t in range(n)):
        angles = [position * base ** (-2 * i / DIM) for i in range(DIM // 2)]
        assert packed.rotation[FULL][0][token, 0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
        assert packed.rotation[FULL][1][token, 0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


def test_queries_and_keys_are_turned_and_gradients_turned_back(attention: PackedAttention) -> None:
    """Against complex numbers: halves (a, b) are a + ib, a rotation is a product with cos + i sin. 1e-12 in float64."""
    lengths = [6, 4]
    packed = PackedSequences.of(lengths)
    PackedRotary(one_kind(100.0, DIM), torch.float64)(packed)
    inputs = [draw(10, heads, seed).requires_grad_() for seed, heads in enumerate((HEADS, GROUPS, GROUPS))]
    out = attention(*inputs, packed_seq_params=packed)

    def turned(x: torch.Tensor) -> torch.Tensor:
        product = torch.complex(*x[:, 0].chunk(2, dim=-1)) * torch.complex(*packed.rotation[FULL])
        return torch.cat([product.real, product.imag], dim=-1)[:, None]

    query, key, value = inputs
    expected = naive(turned(query), turned(key), value, lengths, attention.softmax_scale)
    assert (out - expected).abs().max() < VALUE
    direction = draw(10, HEADS, 9).flatten(2)
    for mine, theirs in zip(torch.autograd.grad((out * direction).sum(), inputs), torch.autograd.grad((expected * direction).sum(), inputs),
                            strict=True):
        assert (mine - theirs).abs().max() < GRADIENT


def test_rotation_of_long_positions_stays_exact() -> None:
    """float32 angles at position 32767: off by no more than the angle's own rounding (2e-3), and bfloat16 tables come from them."""
    packed = PackedSequences.of([32768])
    PackedRotary(one_kind(1e6, 128), torch.float32)(packed)
    cosine, sine = packed.rotation[FULL]
    assert cosine[-1, 0, 0].item() == pytest.approx(math.cos(32767), abs=2e-3)
    assert sine[-1, 0, 63].item() == pytest.approx(math.sin(32767 * 1e6 ** (-126 / 128)), abs=1e-6)
    PackedRotary(one_kind(1e6, 128), torch.bfloat16)(packed)
    assert torch.equal(packed.rotation[FULL][0], cosine.bfloat16())


def test_other_packing_is_refused(attention: PackedAttention) -> None:
    q = draw(2, HEADS, 0)
    with pytest.raises(TypeError, match="packed attention needs PackedSequences, got NoneType"):
        attention(q, q, q)
