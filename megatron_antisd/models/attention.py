"""Packed causal attention on torch, with and without a key/value cache.

Megatron's own torch attention refuses packed sequences. Here a row of T tokens holds many sequences end to end
(`PackedSequences`); rotary positions restart at every sequence and no sequence sees another, except that a sequence may continue an
earlier one: the responses to one prompt, say, which then passes through the model once. Inside the attention alone the sequences are laid
out as a few right-padded batches of similar length, so the kernel is plain causal SDPA (for continuations, with the diagonal at the lower right).

Under context parallelism a rank holds two of the row's 2 CP equal chunks, one from each end: causal attention then costs every rank about the
same. It attends with its own queries to the keys and values of the whole row, which are gathered; a chunk that begins inside a sequence
is a continuation of what stands before it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.bias import causal_lower_right

from megatron_antisd.models.rotary import FULL, SLIDING, Frequencies
from megatron_antisd.models.routing import RowRoutes


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
    """n pieces of sequences, up to L tokens of each; padding repeats a piece's last token."""

    query: torch.Tensor
    """[n, L], among this rank's tokens."""
    key: torch.Tensor
    """[n, P + L], among the row's tokens (as they are gathered under context parallelism): the P tokens before each piece, then its own."""


@dataclass(frozen=True)
class _Piece:
    """Tokens of one sequence that this rank holds, as positions in the row."""

    own: range
    before: tuple[range, ...]
    """What its first token sees besides itself: the sequence that this one continues, and its own tokens on other ranks."""

    @property
    def depth(self) -> int:
        return sum(map(len, self.before))


@dataclass
class PackedSequences(PackedSeqParams):
    """How a row of T tokens divides into sequences; travels through Megatron as its `packed_seq_params`. This rank holds T / CP of the tokens.

    `qkv_format` is deliberately not "thd": Megatron then treats the row as [T, batch 1, ...].
    """

    positions: torch.Tensor = None
    """[T / CP] position of each token in its own sequence."""
    rotation: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Kind of layer -> cosine and sine of each token's angles, both [T / CP, 1, head_dim / 2]; `PackedRotary` sets them."""
    batches: tuple[AttentionBatch, ...] = ()
    unpack: torch.Tensor = None
    """[T / CP]: where each token stands in the concatenation of all batches' flattened queries."""
    context: dist.ProcessGroup | None = None
    """The ranks that share the row; None: this one has it all."""
    cache: KeyValueCache | None = None
    slot: torch.Tensor | None = None
    """[T] cache slot of each token, -1 for none; with a cache only."""
    decode: bool = False
    """One new token per sequence, attending to the cache."""
    routes: RowRoutes | None = None
    """The row's experts, for the routers (`models.routing`); None: they choose and nothing is kept."""

    @cached_property
    def remembered(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the tokens that go into the cache: which they are, their slots and their positions. Once a row, not once a layer: finding
        them makes a GPU wait."""
        row = torch.nonzero(self.slot >= 0)[:, 0]
        return row, self.slot[row], self.positions[row]

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str = "cpu", waste: float = 0.25,
           continues: Sequence[int | None] | None = None, context: dist.ProcessGroup | None = None) -> PackedSequences:
        """Lay out sequences of `lengths`. `waste`: largest share of padding tolerated inside an attention batch. `continues`: for each
        sequence the number of the one that it goes on from, which must itself begin at position 0; None for a beginning. `context`: the
        ranks that share the row, whose length must then divide by twice their number."""
        parents = [None] * len(lengths) if continues is None else list(continues)
        rank, size = (0, 1) if context is None else (context.rank(), context.size())
        total = sum(lengths)
        parts = [context_part(total, each, size) for each in range(size)]
        held = parts[rank]
        local, gathered = torch.full((total,), -1), torch.empty(total, dtype=torch.int64)
        local[held], gathered[torch.cat(parts)] = torch.arange(len(held)), torch.arange(total)
        pieces = _pieces(lengths, parents, local)
        unpack = torch.empty(len(held), dtype=torch.int64)
        batches, offset = [], 0
        for group in _similar(pieces, waste):
            span = torch.arange(max(len(piece.own) for piece in group))
            width = torch.tensor([len(piece.own) for piece in group])[:, None]
            own = torch.tensor([piece.own.start for piece in group])[:, None] + torch.minimum(span, width - 1)
            before = torch.stack([torch.cat([torch.arange(part.start, part.stop) for part in piece.before]) for piece in group])
            query = local[own]
            batches.append(AttentionBatch(query.to(device), gathered[torch.cat([before, own], dim=1)].to(device)))
            valid = span < width
            unpack[query[valid]] = (offset + torch.arange(query.numel()).view_as(query))[valid]
            offset += query.numel()
        depths = [0 if parent is None else lengths[parent] for parent in parents]
        positions = torch.cat([torch.arange(first, first + n) for first, n in zip(depths, lengths, strict=True)])
        longest = int(positions.max()) + 1
        return PackedSequences(
            qkv_format="packed", positions=positions[held].to(device), batches=tuple(batches), unpack=unpack.to(device), context=context,
            max_seqlen_q=longest, max_seqlen_kv=longest,
        )

    @staticmethod
    def decoding(positions: Sequence[int], slots: Sequence[int], cache: KeyValueCache, device: torch.device | str = "cpu") -> PackedSequences:
        """One new token for each of the sequences in `slots` (-1 for padding), which are `positions` tokens long so far."""
        return PackedSequences(
            qkv_format="packed", positions=torch.tensor(positions, device=device), slot=torch.tensor(slots, device=device), cache=cache, decode=True,
            max_seqlen_q=1, max_seqlen_kv=max(positions) + 1)


def context_part(tokens: int, rank: int, size: int) -> torch.Tensor:
    """[tokens / size] positions in a row that context-parallel rank `rank` of `size` holds: chunks `rank` and `2 size - 1 - rank` of 2 size.
    Raises ValueError where the row does not divide."""
    if size == 1:
        return torch.arange(tokens)
    if tokens % (2 * size):
        raise ValueError(f"a row of {tokens} tokens cannot be shared by {size} context-parallel ranks: it must divide by {2 * size}")
    chunks = torch.arange(tokens).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[-1 - rank]])


def _pieces(lengths: Sequence[int], parents: Sequence[int | None], local: torch.Tensor) -> list[_Piece]:
    """This rank's runs of neighbouring tokens, sequence by sequence. `local` [T]: at or above 0 for tokens that are here."""
    ends = list(itertools.accumulate(lengths))
    pieces = []
    for length, end, parent in zip(lengths, ends, parents, strict=True):
        start = end - length
        trunk = () if parent is None else (range(ends[parent] - lengths[parent], ends[parent]),)
        here = local[start:end] >= 0
        borders = (torch.nonzero(here[1:] != here[:-1])[:, 0] + start + 1).tolist()
        for first, last in itertools.pairwise([start, *borders, end]):
            if local[first] >= 0:
                pieces.append(_Piece(own=range(first, last), before=(*trunk, range(start, first))))
    return pieces


def _similar(pieces: Sequence[_Piece], waste: float) -> list[list[_Piece]]:
    """Pieces in groups of equal depth and of lengths so near that padding to the longest wastes at most `waste`."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda p: (p.depth, len(p.own))):
        if groups and groups[-1][0].depth == piece.depth:
            # Ascending lengths: the newcomer sets the width; open a new batch when padding would exceed `waste`.
            members = [*groups[-1], piece]
            if sum(len(p.own) for p in members) >= (1 - waste) * len(piece.own) * len(members):
                groups[-1].append(piece)
                continue
        groups.append([piece])
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
        # Megatron's own refuses context parallelism; it is done here.
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, layer_number, *args, **kwargs)
        self.config = config
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
        if packed.context is not None:
            # One collective for both; backward it adds up what all ranks' queries say of this rank's keys and values.
            k, v = gather_from_sequence_parallel_region(torch.stack([k, v], dim=1), group=packed.context).unbind(1)
        outputs = []
        for batch in packed.batches:
            before = batch.key.shape[1] - batch.query.shape[1]
            unseen = 0 if self.window is None else max(0, before - self.window + 1)
            key = batch.key[:, unseen:]
            tensors = [x[index].transpose(1, 2) for x, index in ((q, batch.query), (k, key), (v, key))]  # [n, heads, L or P + L, d]
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
        # Of the kernels that take such a mask, the lean one on GPUs wants a key for every query head.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        outputs = []
        for start in range(keys - queries, keys, self.window):
            end, first = min(start + self.window, keys), max(0, start - self.window + 1)
            distance = torch.arange(start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
            block = slice(start - keys + queries, end - keys + queries)
            outputs.append(F.scaled_dot_product_attention(
                q[:, :, block], k[:, :, first:end], v[:, :, first:end], attn_mask=(distance >= 0) & (distance < self.window),
                scale=self.softmax_scale))
        return torch.cat(outputs, dim=2)

    def _remember(self, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> None:
        keys, values = packed.cache.of(self.layer_number, k)
        row, slot, position = packed.remembered
        keys[slot, :, position] = k[row]
        values[slot, :, position] = v[row]

    def _decode(self, q: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        keys, values = packed.cache.of(self.layer_number, q)
        slot = packed.slot.clamp(min=0)
        longest = packed.max_seqlen_kv
        distance = packed.positions[:, None] - torch.arange(longest, device=q.device)[None]  # [T, longest]
        seen = (distance >= 0) & (distance < (self.window or longest))
        out = F.scaled_dot_product_attention(
            q[:, :, None], keys[slot, :, :longest], values[slot, :, :longest], attn_mask=seen[:, None, None],
            scale=self.softmax_scale, enable_gqa=q.shape[1] != keys.shape[1])
        return out.squeeze(2)
