"""Packed causal attention on torch, with and without a key/value cache.

Megatron's own torch attention refuses packed sequences. Here a row of T tokens holds many sequences end to end
(`PackedSequences`); rotary positions restart at every sequence and no sequence sees another, except that a sequence may continue an
earlier one: the responses to one prompt, say, which then passes through the model once. Inside the attention alone the sequences are laid
out as a few right-padded batches of similar length, so the kernel is plain causal SDPA (for continuations, with the diagonal at the lower right).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.bias import causal_lower_right

from megatron_antisd.models.rotary import FULL, SLIDING, Frequencies


@dataclass
class KeyValueCache:
    """Keys and values of `slots` sequences for the decoder layers of this rank."""

    slots: int
    capacity: int
    """Tokens a slot can hold."""
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Layer number -> two tensors [slots, heads/tp, capacity, head_dim]."""

    def of(self, layer: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.layers:
            shape = (self.slots, key.shape[-2], self.capacity, key.shape[-1])
            self.layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self.layers[layer]


@dataclass(frozen=True)
class AttentionBatch:
    """n sequences of up to L tokens as row indices; padding repeats a sequence's last token."""

    query: torch.Tensor
    """[n, L]."""
    key: torch.Tensor
    """[n, P + L]: before the queries the sequences that these continue, all of P tokens; `query` itself where they begin themselves."""


@dataclass
class PackedSequences(PackedSeqParams):
    """How a row of T tokens divides into sequences; travels through Megatron as its `packed_seq_params`.

    `qkv_format` is deliberately not "thd": Megatron then treats the row as [T, batch 1, ...].
    """

    positions: torch.Tensor = None
    """[T] position of each token in its own sequence."""
    rotation: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Kind of layer -> cosine and sine of each token's angles, both [T, 1, head_dim / 2]; `PackedRotary` sets them."""
    batches: tuple[AttentionBatch, ...] = ()
    unpack: torch.Tensor = None
    """[T]: where token t stands in the concatenation of all batches' flattened queries."""
    cache: KeyValueCache | None = None
    slot: torch.Tensor | None = None
    """[T] cache slot of each token, -1 for none; with a cache only."""
    decode: bool = False
    """One new token per sequence, attending to the cache."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu", waste: float = 0.25,
           continues: Sequence[int | None] | None = None) -> PackedSequences:
        """Lay out sequences of `lengths`. `waste`: largest share of padding tolerated inside an attention batch. `continues`: for each
        sequence the number of the one that it goes on from, which must itself begin at position 0; None for a beginning."""
        parents = [None] * len(lengths) if continues is None else list(continues)
        before = [0 if parent is None else lengths[parent] for parent in parents]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        unpack = torch.empty(sum(lengths), dtype=torch.int64)
        batches, offset = [], 0
        for group in _similar(lengths, before, waste):
            span = torch.arange(max(lengths[i] for i in group))
            size = torch.tensor([lengths[i] for i in group])[:, None]
            query = starts[group][:, None] + torch.minimum(span, size - 1)
            trunks = [parents[i] for i in group if parents[i] is not None]
            key = torch.cat([starts[trunks][:, None] + torch.arange(before[group[0]]), query], dim=1) if trunks else query
            batches.append(AttentionBatch(query.to(device), key.to(device)))
            flat = offset + torch.arange(query.numel()).view_as(query)
            valid = span < size
            unpack[query[valid]] = flat[valid]
            offset += query.numel()
        positions = torch.cat([torch.arange(first, first + n) for first, n in zip(before, lengths, strict=True)])
        longest = int(positions.max()) + 1
        return PackedSequences(
            qkv_format="packed", positions=positions.to(device), batches=tuple(batches), unpack=unpack.to(device),
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )


def _similar(lengths: Sequence[int], before: Sequence[int], waste: float) -> list[list[int]]:
    """Numbers of the sequences in groups of equal `before` and lengths so near that padding to the longest wastes at most `waste`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (before[i], lengths[i])):
        if groups and before[groups[-1][0]] == before[index]:
            # Ascending lengths: the newcomer sets the width; open a new batch when padding would exceed `waste`.
            members = [*groups[-1], index]
            if sum(lengths[i] for i in members) >= (1 - waste) * lengths[index] * len(members):
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


class PackedRotary(torch.nn.Module):
    """Cosines and sines of a row, once for all layers; takes the place of Megatron's rotary module.

    They are left in the `PackedSequences` for `PackedAttention`, which turns queries and keys itself: Megatron's own way takes cosine and sine
    anew in every layer and copies each tensor several times.
    """

    def __init__(self, frequencies: Mapping[str, Frequencies], dtype: torch.dtype) -> None:
        super().__init__()
        self._frequencies, self._dtype = dict(frequencies), dtype

    def get_rotary_seq_len(self, inference_context: Any, decoder: Any, x: Any, config: Any, packed: PackedSequences) -> PackedSequences:
        """Megatron asks for a length and hands the answer to `forward`; the packing itself is what is needed there."""
        return packed

    def forward(self, packed: PackedSequences, packed_seq: bool = False, cp_group: Any = None) -> None:
        """Sets `packed.rotation`; None tells Megatron that there is nothing left to turn."""
        packed.rotation = {}
        for kind, (inverse, scale) in self._frequencies.items():
            angles = packed.positions[:, None].float() * inverse.to(packed.positions.device)  # in float32, whatever the model's dtype
            packed.rotation[kind] = tuple((table * scale).to(self._dtype)[:, None] for table in (angles.cos(), angles.sin()))


class _Rotate(torch.autograd.Function):
    """x [T, heads, d] with its halves (a, b) -> (a cos - b sin, b cos + a sin). The backward pass turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turn(gradient, *ctx.saved_tensors, -1), None, None


def _turn(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, sign: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    torch.mul(x[..., :half], cosine, out=out[..., :half])
    torch.mul(x[..., half:], cosine, out=out[..., half:])
    out[..., :half].addcmul_(x[..., half:], sine, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sine, value=sign)
    return out


class PackedAttention(DotProductAttention):
    """Rotary positions and core attention on SDPA for `PackedSequences`. query [T, 1, heads/tp, d], key and value
    [T, 1, groups/tp, d] -> [T, 1, heads/tp * d]."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        self.kind = SLIDING if windowed else FULL
        self.window = config.window_size[0] + 1 if windowed else None
        """How many last tokens one sees, itself included; None: all."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None,
                attn_mask_type: Any = None, attention_bias: Any = None,
                packed_seq_params: PackedSequences | None = None) -> torch.Tensor:
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError(f"packed attention needs PackedSequences, got {type(packed_seq_params).__name__}")
        q, k = (_Rotate.apply(x.squeeze(1), *packed_seq_params.rotation[self.kind]) for x in (query, key))
        v = value.squeeze(1)
        if packed_seq_params.cache is not None:
            self._remember(k, v, packed_seq_params)
        out = self._decode(q, packed_seq_params) if packed_seq_params.decode else self._packed(q, k, v, packed_seq_params)
        return out.reshape(q.shape[0], 1, -1)

    def _packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        outputs = []
        for batch in packed.batches:
            tensors = [x[index].transpose(1, 2) for x, index in ((q, batch.query), (k, batch.key), (v, batch.key))]  # [n, heads, L or P + L, d]
            outputs.append(self._attend(*tensors).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[packed.unpack]

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[n, heads, L, d] queries to [n, groups, K, d] keys, the last query beside the last key."""
        queries, keys = q.shape[2], k.shape[2]
        options = {"scale": self.softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
        if self.window is None or keys <= self.window:
            # A bias of this kind keeps the fused kernels on GPUs.
            mask = {"is_causal": True} if queries == keys else {"attn_mask": causal_lower_right(queries, keys)}
            return F.scaled_dot_product_attention(q, k, v, **options, **mask)
        # Blocks of queries, each with the keys that one of them sees: work and memory grow with the window, not with the square of the length.
        outputs = []
        for start in range(keys - queries, keys, self.window):
            end, first = min(start + self.window, keys), max(0, start - self.window + 1)
            distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
            block = slice(start - keys + queries, end - keys + queries)
            outputs.append(F.scaled_dot_product_attention(
                q[:, :, block], k[:, :, first:end], v[:, :, first:end], attn_mask=(distance >= 0) & (distance < self.window), **options))
        return torch.cat(outputs, dim=2)

    def _remember(self, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> None:
        keys, values = packed.cache.of(self.layer_number, k)
        real = packed.slot >= 0
        slot, position = packed.slot[real], packed.positions[real]
        keys[slot, :, position] = k[real]
        values[slot, :, position] = v[real]

    def _decode(self, q: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        keys, values = packed.cache.of(self.layer_number, q)
        slot = packed.slot.clamp(min=0)
        longest = int(packed.positions.max()) + 1
        distance = packed.positions[:, None] - torch.arange(longest, device=q.device)[None]  # [T, longest]
        seen = (distance >= 0) & (distance < (self.window or longest))
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys[slot, :, :longest], values[slot, :, :longest], attn_mask=seen[:, None, None],
            scale=self.softmax_scale, enable_gqa=q.shape[1] != keys.shape[1])
        return out.squeeze(2)
