"""The oracle of given experts: transformers in float64, one view at a time, its routers made to take the view's experts, and autograd."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from tiny import make_views

from megatron_antisd.algorithm import clipped_surrogate, token_advantage, token_weights
from megatron_antisd.records import ScoringView, TrainingBatch
from megatron_antisd.token_routes import TokenRoutes

LAYERS, EXPERTS, TOP_K = 4, 8, 2


def some_routes(ids: Sequence[int], *, free: int = 0, layers: int = LAYERS, experts: int = EXPERTS, top_k: int = TOP_K) -> TokenRoutes:
    """Random experts of each token of `ids`, which depend on the tokens up to it alone: views that begin alike agree on their beginning."""
    rows, state = [], b""
    for token in ids:
        state = hashlib.blake2b(state + bytes([token]), digest_size=8).digest()
        rng = numpy.random.default_rng(int.from_bytes(state, "big"))
        rows.append([rng.permutation(experts)[:top_k] for _ in range(layers)])
    return TokenRoutes.of(numpy.array(rows)[free:], free=free)


def routed_views() -> tuple[ScoringView, ...]:
    """The views of the layout tests, two sets of which share a trunk; of one the prompt routes by itself, another one altogether."""
    views = []
    for index, view in enumerate(make_views()):
        inputs = [*view.prompt_ids, *view.response_ids[:-1]]
        free = len(view.prompt_ids) if index == 5 else 0
        views.append(view if index == 6 else replace(view, routes=some_routes(inputs, free=free)))
    return tuple(views)


def unrouted(views: Sequence[ScoringView]) -> tuple[ScoringView, ...]:
    return tuple(replace(view, routes=None) for view in views)


@dataclass
class Oracle:
    """What transformers says of the views."""

    log_prob: torch.Tensor
    """[sum T_i]"""
    chosen: list[torch.Tensor]
    """Of each view [L, T, top_k]: what the routers would have chosen, given what they were made to take in the layers before."""
    equal: list[float]
    """Of each layer the share of tokens with given experts where the two sets are the same."""
    loss: float = float("nan")
    gradients: dict[str, torch.Tensor] | None = None
    """Under the names that transformers has in memory."""


def ask(checkpoint: Path, views: Sequence[ScoringView], batch: TrainingBatch | None = None) -> Oracle:
    """With a batch its loss and the gradients too."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, experts_implementation="eager")
    routers = [layer.mlp.gate for layer in model.model.layers]
    given: list[torch.Tensor | None] = [None]
    chosen: list[torch.Tensor] = []
    for number, router in enumerate(routers):
        router.forward = _Router(router, number, given, chosen)
    log_probs, choices, counts = [], [], torch.zeros(len(routers), 2)
    for view in views:
        given[0] = None if view.routes is None else torch.from_numpy(view.routes.array()).long()
        chosen.clear()
        logits = model(torch.tensor([[*view.prompt_ids, *view.response_ids[:-1]]])).logits[0, len(view.prompt_ids) - 1 :]
        log_probs.append(logits.log_softmax(-1).gather(1, torch.tensor(view.response_ids)[:, None])[:, 0])
        choices.append(torch.stack(chosen))
        if given[0] is not None:
            fixed = given[0][:, 0, 0] >= 0
            same = (choices[-1].sort(-1).values == given[0].transpose(0, 1).sort(-1).values).all(-1)
            counts += torch.stack([same[:, fixed].sum(1), fixed.sum().expand(len(routers))], dim=1)
    log_prob = torch.cat(log_probs)
    oracle = Oracle(log_prob=log_prob.detach(), chosen=choices, equal=(counts[:, 0] / counts[:, 1]).tolist())
    if batch is not None:
        loss = _loss(batch, log_prob)
        loss.backward()
        oracle.loss, oracle.gradients = float(loss.detach()), {name: parameter.grad for name, parameter in model.named_parameters()}
    return oracle


class _Router:
    """Stands for the forward pass of transformers' router."""

    def __init__(self, router: torch.nn.Module, layer: int, given: list[torch.Tensor | None], chosen: list[torch.Tensor]) -> None:
        self.router, self.layer, self.given, self.chosen = router, layer, given, chosen

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden, self.router.weight)
        probs = logits.softmax(-1)
        own = probs.topk(self.router.top_k, dim=-1).indices
        self.chosen.append(own)
        taken = own
        if self.given[0] is not None:
            mine = self.given[0][:, self.layer]
            taken = torch.where(mine >= 0, mine, own)
        weights = probs.gather(1, taken)
        return logits, weights / weights.sum(-1, keepdim=True), taken


def _loss(batch: TrainingBatch, log_prob: torch.Tensor) -> torch.Tensor:
    weights = token_weights(batch.lengths, batch.sequence_mask, "token_mean").double()
    advantage = token_advantage(batch.sequence_advantage.repeat_interleave(torch.tensor(batch.lengths)).double(), log_prob.detach(),
                                batch.teacher_log_prob.double(), batch.teacher_mask, method="antisd", lambda_=batch.lambda_, compose="additive")
    return clipped_surrogate(log_prob, None, advantage, weights, 0.2)[0]
