"""Ranks of the routing test: every layout of this number of ranks, one after another in one process, against transformers with the same experts.

Usage: routing_ranks.py CHECKPOINT ORACLES.pt RESULT.json CASE...
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, gradients, make_batch
from routed import EXPERTS, Oracle, routed_views, some_routes, unrouted
from tiny import gradient_on_disk

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import RunConfig
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import ScoringView
from megatron_antisd.token_routes import TokenRoutes

CHECKPOINT, ORACLES, RESULT, *CASES = sys.argv[1:]


def relative_errors(found: dict[str, torch.Tensor], oracle: Oracle) -> dict[str, float]:
    return {name: float((tensor.double() - gradient_on_disk(oracle.gradients, name)).norm()
                        / gradient_on_disk(oracle.gradients, name).norm().clamp(min=1e-8))
            for name, tensor in found.items()}


def other_sets(recorded: tuple[TokenRoutes, ...], oracle: Oracle) -> int:
    """Tokens and layers where another set was recorded than transformers chooses."""
    return sum(int((torch.from_numpy(routes.array()).transpose(0, 1).long().sort(-1).values != chosen.sort(-1).values).any(-1).sum())
               for routes, chosen in zip(recorded, oracle.chosen, strict=True))


def case_facts(config: RunConfig, forced: Oracle, free: Oracle) -> dict[str, Any]:
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=0)
    trainer = Trainer(config, layout, describe(CHECKPOINT, layout.tensor_size))
    views = routed_views()
    plain = unrouted(views)
    recorded = trainer.score(plain, record_routes=True)
    replayed = trainer.score([ScoringView(**{**vars(v), "routes": r}) for v, r in zip(plain, recorded.routes, strict=True)], record_routes=True)
    scores = trainer.score(views)
    stats = trainer.step(make_batch(views, 0), learning_rate=1e-3)
    errors = relative_errors(gradients(trainer, stats.grad_norm), forced)
    facts = {
        "score": float((scores.log_prob - forced.log_prob).abs().max()), "step": float((stats.student.log_prob - forced.log_prob).abs().max()),
        "free": float((recorded.log_prob - free.log_prob).abs().max()), "loss": abs(stats.loss - forced.loss),
        "gradient": max(errors.values()), "router_gradient": max(error for name, error in errors.items() if ".gate." in name),
        "tensors": len(errors), "worst": max(errors, key=errors.get),
        "equal": max(abs(a - b) for a, b in zip(stats.routes_equal, forced.equal, strict=True)),
        "recorded_others": other_sets(recorded.routes, free), "recorded_again": replayed.routes == recorded.routes,
        "replay_of_own": float((replayed.log_prob - recorded.log_prob).abs().max()), "refused": refusals(trainer, views),
        "deaf": deaf(trainer, views),
    }
    # Nothing of a row stays behind.
    routers = [module.router for chunk in trainer.chunks for module in chunk.modules() if hasattr(module, "router")]
    facts["left"] = sum(router.router_replay is not None for router in routers)
    return facts


def refusals(trainer: Any, views: tuple[ScoringView, ...]) -> dict[str, str]:
    """Views that do not fit are refused on every rank alike, before anything runs."""
    ids = [*views[1].prompt_ids, *views[1].response_ids[:-1]]
    good = some_routes(ids)
    twice, far = good.array(), good.array()
    twice[3, 2] = twice[3, 2, 0]
    far[4, 1, 1] = EXPERTS
    cases = {
        "length": some_routes([*ids, 5]), "layers": some_routes(ids, layers=3), "top_k": some_routes(ids, top_k=3),
        "twice": TokenRoutes.of(twice), "far": TokenRoutes.of(far),
    }
    found = {}
    for name, routes in cases.items():
        bad = [ScoringView(**{**vars(view), "routes": routes}) if index == 1 else view for index, view in enumerate(views)]
        try:
            trainer.score(bad)
        except ValueError as error:
            found[name] = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return found if all(other == found for other in everyone) else {"ranks": "disagree"}


def deaf(trainer: Any, views: tuple[ScoringView, ...]) -> list[Any]:
    """What each rank raises where the routers of the last one do not ask for their experts, and whether the weights moved."""
    from megatron_antisd.models.routing import RoutedLayer

    before = [parameter.detach().clone() for chunk in trainer.chunks for parameter in chunk.parameters()]
    following, found = RoutedLayer._following, []
    if dist.get_rank() == dist.get_world_size() - 1:
        RoutedLayer._following = lambda self, row: contextlib.nullcontext()
    for act in (lambda: trainer.step(make_batch(views, 0), learning_rate=1e-3), lambda: trainer.score(views)):
        try:
            act()
            found.append("nothing")
        except RuntimeError as error:
            found.append(str(error))
    RoutedLayer._following = following
    after = [parameter for chunk in trainer.chunks for parameter in chunk.parameters()]
    found.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def main() -> None:
    start_process_group(60)
    forced, free = torch.load(ORACLES, weights_only=False)
    megatron_cpu.install()
    from megatron.core import parallel_state

    facts: dict[str, Any] = {}
    for case in CASES:
        facts[case] = case_facts(configuration(CHECKPOINT, [text for text in case.split(" ") if text]), forced, free)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(RESULT).write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
