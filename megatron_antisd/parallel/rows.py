"""Micro-batches as this rank runs them: its part of each row under context parallelism, and rows of padding where a schedule needs more."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_antisd.data.packing import CostModel, MicroBatch, pack, plan_bundles
from megatron_antisd.models.attention import PackedSequences, context_part
from megatron_antisd.models.description import FAMILIES, ModelDescription
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


def plan_rows(views: Sequence[ScoringView], layout: ProcessLayout, limit: int, *, model: CostModel) -> RowPlan:
    """Pack `views` into rows of up to `limit` tokens for all data-parallel ranks, equally costly by `model`; keep this rank's."""
    lengths = tuple(len(view.response_ids) for view in views)
    first = torch.tensor([0, *lengths]).cumsum(0)
    bundles, plan = plan_bundles(views, layout.data_size, limit, model)
    tokens = [bundle.tokens(views) for bundle in bundles]
    real = [sum(tokens[b] for b in row) for rank in plan for row in rank]
    fillers = -len(plan[0]) % layout.pipeline_size if layout.virtual_size > 1 else 0
    padding = sum(-length % layout.row_multiple for length in real) + fillers * layout.row_multiple * layout.data_size
    rows = []
    for numbers in plan[layout.data_rank]:
        micro = pack(views, [bundles[b] for b in numbers], multiple=layout.row_multiple)
        rows.append(_row(micro, torch.cat([torch.arange(first[i], first[i + 1]) for i in micro.indices]), layout))
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


def _row(micro: MicroBatch, where: torch.Tensor, layout: ProcessLayout) -> Row:
    device = layout.device
    held = context_part(len(micro.input_ids), layout.context_rank, layout.context_size)
    local = torch.full((len(micro.input_ids),), -1)
    local[held] = torch.arange(len(held))
    predicting = local[micro.predicting]
    mine = predicting >= 0
    context = layout.context if layout.context_size > 1 else None
    return Row(
        input_ids=micro.input_ids[held].to(device), predicting=predicting[mine].to(device), targets=micro.targets[mine].to(device),
        where=where[mine], packed=PackedSequences.of(micro.lengths, device, continues=micro.continues, context=context))
