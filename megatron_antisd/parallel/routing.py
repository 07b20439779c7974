"""Given and recorded experts of a batch: checked before anything runs, counted and put together after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from megatron_antisd.data.packing import input_length
from megatron_antisd.models.build import PolicyModel
from megatron_antisd.models.description import FAMILIES, ModelDescription
from megatron_antisd.models.routing import NOT_RUN, obstacle
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.parallel.rows import Row
from megatron_antisd.records import ScoringView
from megatron_antisd.token_routes import FREE, TokenRoutes


class RoutesError(ValueError):
    """Experts that were given do not fit the model or the view; raised on every rank alike, before anything has run."""


@dataclass(frozen=True, kw_only=True)
class RouteShape:
    """What routes of a model look like."""

    layers: int
    top_k: int
    experts: int

    @staticmethod
    def of(description: ModelDescription) -> RouteShape | None:
        """None for a model without experts."""
        if description.experts is None:
            return None
        fields = FAMILIES[description.hf["model_type"]].fields(description.hf)
        return RouteShape(layers=description.layers, top_k=fields["moe_router_topk"], experts=description.experts)


class BatchRouting:
    """What a trainer's routers are given and choose. Every method is collective."""

    def __init__(self, chunks: Sequence[PolicyModel], description: ModelDescription, layout: ProcessLayout) -> None:
        """`chunks`: this rank's parts of the model."""
        self.shape, self._layout = RouteShape.of(description), layout
        self.obstacle = obstacle(chunks[0].config)
        """Why the model cannot take given experts; None where it can."""
        self._layers = [layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers]

    def require(self) -> RouteShape:
        """Raises RoutesError where the model cannot take given experts."""
        if self.shape is None or self.obstacle is not None:
            raise RoutesError(f"experts are given or recorded, but {self.obstacle}; set routing.replay=off")
        return self.shape

    def check(self, views: Sequence[ScoringView]) -> None:
        """Raises RoutesError where a view's routes do not fit. A data-parallel rank looks at its share of the views' experts: all of a large batch's
        would take one rank seconds."""
        if all(view.routes is None for view in views):
            return
        shape, layout = self.require(), self._layout
        for index, view in enumerate(views):
            if view.routes is not None:
                _check_size(view.routes, shape, input_length(view), f"view {index}")
        mine = range(layout.data_rank, len(views), layout.data_size)
        broken = next((index for index in mine if views[index].routes is not None and _fault(views[index].routes, shape)), len(views))
        first = torch.tensor(broken, device=layout.device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if int(first) < len(views):
            raise RoutesError(f"view {int(first)}: {_fault(views[int(first)].routes, shape)}")

    def equal_shares(self, views: Sequence[ScoringView], rows: Sequence[Row]) -> tuple[float, ...] | None:
        """For each layer the share of the tokens with given experts for which the router would have chosen the same set; None where no token has any.
        `rows` are this rank's of `views` and have been run. Raises as `require_asked`."""
        if all(view.routes is None for view in views):
            return None
        self.require_asked(rows)
        counts = torch.zeros(self.require().layers, 2, dtype=torch.int64, device=self._layout.device)
        for row in rows:
            routes = row.packed.routes
            if routes is None or routes.experts is None:
                continue
            counts[self._layers, 0] += routes.equal[self._layers]
            counts[self._layers, 1] += (routes.experts[self._layers, :, 0] != FREE).sum(dim=1)
        # Tokens are divided over data-, context- and (by sequence parallelism) tensor-parallel ranks, layers over pipeline stages.
        dist.all_reduce(counts)
        return tuple((counts[:, 0].double() / counts[:, 1]).tolist()) if counts[:, 1].all() else None

    def require_asked(self, rows: Sequence[Row]) -> None:
        """Raises RuntimeError, on every rank alike, where a router has not asked for its experts in one of this rank's `rows`. They have been run
        with experts that are given or recorded."""
        ignored = torch.zeros(self.require().layers, dtype=torch.int64, device=self._layout.device)
        for row in rows:
            if row.packed.routes is not None:  # else padding, or views that all route by themselves
                ignored[self._layers] += row.packed.routes.equal[self._layers] == NOT_RUN
        dist.all_reduce(ignored)
        if ignored.any():
            raise RuntimeError(f"the routers of layers {ignored.nonzero()[:, 0].tolist()} did not ask for the experts that were given: this Megatron "
                               "or its configuration goes another way; set routing.replay=off")

    def recorded(self, views: Sequence[ScoringView], rows: Sequence[Row]) -> tuple[TokenRoutes, ...]:
        """What the routers chose for every input token of `views`, on every rank. `rows` were planned to record and have been run."""
        shape, lengths = self.require(), [input_length(view) for view in views]
        kind, kept = (torch.uint8, numpy.uint8) if shape.experts <= 256 else (torch.int32, numpy.uint16)  # gloo sums no int16
        places = [None if row.recorded is None else [index.to(self._layout.device) for index in row.recorded] for row in rows]  # None: padding
        experts = numpy.zeros((sum(lengths), shape.layers, shape.top_k), dtype=kept)
        for layer in range(shape.layers):  # one at a time on the device: all of a large batch's would take gigabytes
            chosen = torch.zeros(sum(lengths), shape.top_k, dtype=kind, device=self._layout.device)
            for row, place in zip(rows, places, strict=True):
                if place is not None and layer in self._layers:
                    chosen[place[1]] = row.packed.routes.chosen[layer, place[0]].to(kind)
            dist.all_reduce(chosen)  # each element has one contributor
            experts[:, layer] = chosen.cpu().numpy()
        ends = numpy.cumsum([0, *lengths])
        return tuple(TokenRoutes.of(experts[ends[i] : ends[i + 1]]) for i in range(len(views)))


def _check_size(routes: TokenRoutes, shape: RouteShape, tokens: int, whose: str) -> None:
    if (routes.layers, routes.top_k) != (shape.layers, shape.top_k):
        raise RoutesError(f"{whose}: the routes have {routes.layers} layers and {routes.top_k} experts a token, the model has {shape.layers} and "
                          f"{shape.top_k}: they are another model's")
    if routes.tokens != tokens:
        raise RoutesError(f"{whose}: routes of {routes.tokens} tokens, expected {tokens}: prompt and response less the last token")


def _fault(routes: TokenRoutes, shape: RouteShape) -> str:
    """What is wrong with the experts of a view, empty where nothing is."""
    given = routes.array()[routes.free :]
    if given.size and int(given.max()) >= shape.experts:
        token, layer, _ = (int(n) for n in numpy.argwhere(given >= shape.experts)[0])
        return f"token {routes.free + token} goes to expert {int(given[token, layer].max())} in layer {layer}, the model has 0 to {shape.experts - 1}"
    # A token that goes to an expert twice goes to fewer experts than it should, and nothing would fail.
    columns = [numpy.ascontiguousarray(given[..., i]) for i in range(shape.top_k)]
    for i, column in enumerate(columns):
        for other in columns[:i]:
            if (column == other).any():
                token, layer = (int(n) for n in numpy.argwhere(column == other)[0])
                return f"token {routes.free + token} has an expert twice in layer {layer}: {given[token, layer].tolist()}"
    return ""
