"""Experts that are given instead of chosen: the same for a row's forward pass, its recomputation and so its backward pass.

Megatron-Core has a routing replay of its own: a queue of targets in every router and a mode that is switched between forward and backward. A
recomputation pops the queue; with a pipeline, whose micro-batches' passes alternate, the mode is wrong for one of them and the gradients with it,
silently. Here a row's experts travel with the row, in `packed_seq_params`, which Megatron hands to each layer whenever it runs it, also when it
computes it anew. No router remembers anything between two calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

NOT_RUN = -1


@dataclass
class RowRoutes:
    """The experts of one row: T tokens as this rank's routers see them (its sequence-parallel part), all L layers of the model. What routers write
    is written again, with the same values, when a layer is computed anew."""

    experts: torch.Tensor | None
    """[L, T, top_k] int16 expert ids, -1 throughout where a token routes by itself; None: all do."""
    equal: torch.Tensor
    """[L] int64, written by the routers: tokens with given experts for which the router would have chosen the same set. NOT_RUN until it ran."""
    chosen: torch.Tensor | None
    """[L, T, top_k] int16, written by the routers: their own choice; None where nobody asks."""

    @staticmethod
    def of(experts: torch.Tensor | None, shape: tuple[int, int, int], device: torch.device, *, record: bool) -> RowRoutes:
        """`shape` is (L, T, top_k)."""
        return RowRoutes(experts=None if experts is None else experts.to(device),
                         equal=torch.full(shape[:1], NOT_RUN, dtype=torch.int64, device=device),
                         chosen=torch.zeros(shape, dtype=torch.int16, device=device) if record else None)


@dataclass(frozen=True)
class _LayerRoutes:
    """One layer's part of a row, as what Megatron calls a router's `router_replay`: it is asked for the top-k of the router's scores."""

    row: RowRoutes
    layer: int

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, experts] scores -> ([T, top_k] scores of the experts that are taken, with their gradient, and [T, top_k] int64 which they are)."""
        own_scores, own = default_compute_topk(scores, topk, num_groups, group_topk)
        row = self.row
        if row.chosen is not None:
            row.chosen[self.layer] = own
        if row.experts is None:
            row.equal[self.layer] = 0
            return own_scores, own
        given = row.experts[self.layer].long()  # gather and scatter take no other integers
        if given.shape != own.shape:
            raise RuntimeError(f"layer {self.layer}: the router has {tuple(own.shape)} tokens and experts, the row's routes {tuple(given.shape)}")
        fixed = given[:, :1] >= 0
        taken = torch.where(fixed, given, own)
        members = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, taken, True)
        row.equal[self.layer] = (members.gather(1, own).all(dim=1) & fixed[:, 0]).sum()
        return scores.gather(1, taken), taken


class RoutedLayer(TransformerLayer):
    """A transformer layer with experts whose router takes those of `packed_seq_params.routes`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._row: RowRoutes | None = None
        # `model.recompute_modules: [mlp]` computes the experts anew when this layer's call is long over: what is computed anew must hold its row.
        self._recomputed, self.mlp.moe_layer_recompute = self.mlp.moe_layer_recompute, False
        self._experts_forward, self.mlp.forward = self.mlp.forward, self._routed_experts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._row = getattr(kwargs.get("packed_seq_params"), "routes", None)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._row = None

    def _routed_experts(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands for the forward pass of the layer's experts, router and all."""
        row = self._row

        def run(hidden: torch.Tensor) -> Any:
            with self._following(row):
                return self._experts_forward(hidden, *args, **kwargs)

        return tensor_parallel.checkpoint(run, False, hidden_states) if self._recomputed else run(hidden_states)

    @contextlib.contextmanager
    def _following(self, row: RowRoutes | None) -> Iterator[None]:
        self.mlp.router.router_replay = None if row is None else _LayerRoutes(row, self.layer_number - 1)
        try:
            yield
        finally:
            self.mlp.router.router_replay = None


def obstacle(config: TransformerConfig) -> str | None:
    """Why a model with this configuration would ignore given experts, without a word; None where it takes them."""
    if config.num_moe_experts is None:
        return "the model has no experts"
    if config.moe_router_fusion:
        return "moe_router_fusion chooses in a kernel that takes no given experts"
    kinds = config.moe_router_load_balancing_type
    if "sinkhorn" in (kinds if isinstance(kinds, list) else [kinds]):
        return "the sinkhorn router takes no given experts"
    return None
