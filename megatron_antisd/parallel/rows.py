"""Micro-batches as this rank runs them: its part of each row under context parallelism, and rows of padding where a schedule needs more."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_antisd.data.packing import Bundle, CostModel, MicroBatch, input_length, input_places, pack, plan_bundles
from megatron_antisd.models.attention import PackedSequences, context_part
from megatron_antisd.models.description import FAMILIES, ModelDescription
from megatron_antisd.models.routing import RowRoutes
from megatron_antisd.parallel.layout import ProcessLayout
from megatron_antisd.records import ScoringView


@dataclass(frozen=True, kw_only=True)
class Row:
    """The tokens of one micro-batch that this rank holds (T of them), and the response tokens (R) that it scores. On the rank's device."""

    input_ids: torch.Tensor
    """[T] int64."""
    packed: PackedSequences
    predicting: torch.Tensor
    """[R] positions among this rank's tokens whose hidden state predicts a response token."""
    targets: torch.Tensor
    """[R] those response tokens."""
    where: torch.Tensor
    """[R] their places in the batch's vector of all response tokens; on the host."""
    recorded: tuple[torch.Tensor, torch.Tensor] | None = None
    """Where experts are recorded: [M] places among the tokens that this rank's routers see, and [M] in the batch's vector of all input tokens
    (`packing.input_length` of each view), where the experts chosen for them belong; a trunk's tokens stand there once for each view. On the host."""


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """This rank's rows of a batch."""

    rows: tuple[Row, ...]
    lengths: tuple[int, ...]
    """Response length of every view of the batch."""
    padding_share: float
    """Of all tokens of the batch that pass through the model."""


def cost_model(description: ModelDescription) -> CostModel:
    """What a forward pass computes: a multiplication and an addition for every weight of a matrix that a token meets, and for every number of the
    head that a query meets in a key and in a value. Of experts a token meets those that the router chooses."""
    sizes = description.sizes
    fields = FAMILIES[description.hf["model_type"]].fields(description.hf)
    weights = 0
    for weight in description.weights:
        if "{layer}" in weight.megatron:  # the embedding is looked up, the output layer is counted by response tokens
            meets = fields["moe_router_topk"] if weight.expert else 1
            weights += meets * sum(math.prod(shape) for shape in weight.huggingface.values() if len(shape) == 2)
    sliding = fields.get("window_attn_skip_freq", [0] * sizes.layers)
    windows = Counter(fields["window_size"][0] + 1 if slides else None for slides in sliding)
    pair = 4 * sizes.heads * sizes.head_dim
    return CostModel(token=2 * sizes.layers * weights, scored=2 * sizes.hidden * sizes.vocab,
                     pairs=tuple((window, pair * layers) for window, layers in windows.items()))


def plan_rows(views: Sequence[ScoringView], layout: ProcessLayout, limit: int, *, model: CostModel,
              record: tuple[int, int] | None = None) -> RowPlan:
    """Pack `views` into rows of up to `limit` tokens for all data-parallel ranks, equally costly by `model`; keep this rank's. `record`: (layers,
    top_k) of a model whose routers' choices are kept."""
    lengths = tuple(len(view.response_ids) for view in views)
    first = torch.tensor([0, *lengths]).cumsum(0)
    bundles, plan = plan_bundles(views, layout.data_size, limit, model)
    tokens = [bundle.tokens(views) for bundle in bundles]
    real = [sum(tokens[b] for b in row) for rank in plan for row in rank]
    fillers = -len(plan[0]) % layout.pipeline_size if layout.virtual_size > 1 else 0
    padding = sum(-length % layout.row_multiple for length in real) + fillers * layout.row_multiple * layout.data_size
    rows = []
    for numbers in plan[layout.data_rank]:
        held = [bundles[b] for b in numbers]
        micro = pack(views, held, multiple=layout.row_multiple)
        row = _row(micro, torch.cat([torch.arange(first[i], first[i + 1]) for i in micro.indices]), layout, record=record)
        rows.append(row if record is None else dataclasses.replace(row, recorded=_recorded_places(views, held, micro, layout)))
    return RowPlan(rows=tuple(rows + [filler(layout)] * fillers), lengths=lengths, padding_share=padding / (sum(real) + padding))


def filler(layout: ProcessLayout) -> Row:
    """Padding alone: the interleaved pipeline schedule runs a multiple of its stages' number of rows. Context-parallel ranks share it."""
    none, tokens = torch.empty(0, dtype=torch.int64), layout.row_multiple
    micro = MicroBatch(indices=(), input_ids=torch.zeros(tokens, dtype=torch.int64), lengths=(tokens,), continues=(None,), predicting=none,
                       targets=none, padding=tokens)
    return _row(micro, none, layout)


def lone_row(input_ids: torch.Tensor, packed: PackedSequences, layout: ProcessLayout) -> Row:
    """A row that this context-parallel rank has to itself, nothing of it scored."""
    none = torch.empty(0, dtype=torch.int64)
    return Row(input_ids=input_ids.to(layout.device), packed=packed, predicting=none, targets=none, where=none)


def lone_filler(layout: ProcessLayout) -> Row:
    """Padding alone, shared with no context-parallel rank."""
    tokens = layout.tensor_size
    return lone_row(torch.zeros(tokens, dtype=torch.int64), PackedSequences.of([tokens], layout.device), layout)


def _router_part(tokens: int, layout: ProcessLayout) -> torch.Tensor:
    """[T / CP / TP] the tokens of a row of T that this rank's routers see: under sequence parallelism its part of those it holds."""
    return context_part(tokens, layout.context_rank, layout.context_size).chunk(layout.tensor_size)[layout.tensor_rank]


def _recorded_places(views: Sequence[ScoringView], bundles: Sequence[Bundle], micro: MicroBatch,
                     layout: ProcessLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """See Row.recorded."""
    part = _router_part(len(micro.input_ids), layout)
    local = torch.full((len(micro.input_ids),), -1)
    local[part] = torch.arange(len(part))
    first = torch.tensor([0, *map(input_length, views)]).cumsum(0)
    places = torch.cat(input_places(views, bundles))
    targets = torch.cat([torch.arange(first[i], first[i + 1]) for i in micro.indices])
    mine = local[places] >= 0
    return local[places][mine], targets[mine]


def _row_routes(micro: MicroBatch, layout: ProcessLayout, record: tuple[int, int] | None) -> RowRoutes | None:
    if micro.routes is None and record is None:
        return None
    part = _router_part(len(micro.input_ids), layout)
    layers, top_k = record if micro.routes is None else micro.routes.shape[1:]
    given = None if micro.routes is None else micro.routes[part].transpose(0, 1).contiguous()
    return RowRoutes.of(given, (layers, len(part), top_k), layout.device, record=record is not None)


def _row(micro: MicroBatch, where: torch.Tensor, layout: ProcessLayout, record: tuple[int, int] | None = None) -> Row:
    device = layout.device
    held = context_part(len(micro.input_ids), layout.context_rank, layout.context_size)
    local = torch.full((len(micro.input_ids),), -1)
    local[held] = torch.arange(len(held))
    predicting = local[micro.predicting]
    mine = predicting >= 0
    context = layout.context if layout.context_size > 1 else None
    packed = PackedSequences.of(micro.lengths, device, continues=micro.continues, context=context)
    packed.routes = _row_routes(micro, layout, record)
    return Row(input_ids=micro.input_ids[held].to(device), predicting=predicting[mine].to(device), targets=micro.targets[mine].to(device),
               where=where[mine], packed=packed)
