"""Packed causal attention on torch, with and without a key/value cache.

Megatron's own torch attention refuses packed sequences. Here a row of T tokens holds many sequences end to end
(`PackedSequences`); rotary positions restart at every sequence and no sequence sees another. Inside the attention alone the
sequences are laid out as a few right-padded batches of similar length, so the kernel is plain causal SDPA without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention


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


@dataclass
class PackedSequences(PackedSeqParams):
    """How a row of T tokens divides into sequences; travels through Megatron as its `packed_seq_params`.

    `qkv_format` is deliberately not "thd": Megatron then treats the row as [T, batch 1, ...] and applies the rotary
    frequencies token by token, which `PackedRotary` gathers for `positions`.
    """

    positions: torch.Tensor = None
    """[T] position of each token in its own sequence."""
    batches: tuple[torch.Tensor, ...] = ()
    """Each [n, L]: row indices of n sequences of up to L tokens; padding repeats a sequence's last token."""
    unpack: torch.Tensor = None
    """[T]: where token t stands in the concatenation of all flattened batches."""
    cache: KeyValueCache | None = None
    slot: torch.Tensor | None = None
    """[T] cache slot of each token, -1 for none; with a cache only."""
    decode: bool = False
    """One new token per sequence, attending to the cache."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu", waste: float = 0.25) -> PackedSequences:
        """Lay out sequences of `lengths`. `waste`: largest share of padding tolerated inside an attention batch."""
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        order = sorted(range(len(lengths)), key=lambda i: lengths[i])
        groups: list[list[int]] = []
        for index in order:
            # Ascending lengths: the newcomer sets the width; open a new batch when padding would exceed `waste`.
            if groups:
                members = [*groups[-1], index]
                if sum(lengths[i] for i in members) >= (1 - waste) * lengths[index] * len(members):
                    groups[-1].append(index)
                    continue
            groups.append([index])
        total = sum(lengths)
        unpack = torch.empty(total, dtype=torch.int64)
        batches, offset = [], 0
        for group in groups:
            width = lengths[group[-1]]
            span = torch.arange(width)
            size = torch.tensor([lengths[i] for i in group])[:, None]
            begin = starts[group][:, None]
            index = begin + torch.minimum(span, size - 1)
            batches.append(index.to(device))
            flat = offset + torch.arange(index.numel()).view_as(index)
            valid = span < size
            unpack[index[valid]] = flat[valid]
            offset += index.numel()
        positions = torch.cat([torch.arange(n) for n in lengths])
        longest = max(lengths)
        return PackedSequences(
            qkv_format="packed", positions=positions.to(device), batches=tuple(batches), unpack=unpack.to(device),
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )


class PackedRotary(torch.nn.Module):
    """Rotary frequencies per token from `PackedSequences.positions`; takes the place of Megatron's rotary module."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.inv_freq = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)

    def get_rotary_seq_len(self, inference_context: Any, decoder: Any, x: Any, config: Any, packed: PackedSequences) -> PackedSequences:
        """Megatron asks for a length and hands the answer to `forward`; the packing itself is what is needed there."""
        return packed

    def forward(self, packed: PackedSequences, packed_seq: bool = False, cp_group: Any = None) -> torch.Tensor:
        """[T, 1, 1, head_dim] float32 angles, the halves repeated (not interleaved)."""
        self.inv_freq = self.inv_freq.to(packed.positions.device)
        angles = packed.positions[:, None].float() * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]


class PackedAttention(DotProductAttention):
    """Core attention on SDPA for `PackedSequences`. query [T, 1, heads/tp, d], key and value [T, 1, groups/tp, d] -> [T, 1, heads/tp * d]."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None = None,
                attn_mask_type: Any = None, attention_bias: Any = None,
                packed_seq_params: PackedSequences | None = None) -> torch.Tensor:
        if not isinstance(packed_seq_params, PackedSequences):
            raise TypeError(f"packed attention needs PackedSequences, got {type(packed_seq_params).__name__}")
        q, k, v = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq_params.cache is not None:
            self._remember(k, v, packed_seq_params)
        out = self._decode(q, packed_seq_params) if packed_seq_params.decode else self._packed(q, k, v, packed_seq_params)
        return out.reshape(q.shape[0], 1, -1)

    def _packed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        outputs = []
        for index in packed.batches:
            batch = (x[index].transpose(1, 2) for x in (q, k, v))  # [n, heads, L, d]
            out = F.scaled_dot_product_attention(*batch, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[packed.unpack]

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
        seen = torch.arange(longest, device=q.device)[None] <= packed.positions[:, None]  # [T, longest]
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys[slot, :, :longest], values[slot, :, :longest], attn_mask=seen[:, None, None],
            scale=self.softmax_scale, enable_gqa=q.shape[1] != keys.shape[1])
        return out.squeeze(2)
