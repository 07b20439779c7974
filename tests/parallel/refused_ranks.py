"""Updates that are refused, on two ranks: weights, moments and step counts stay, and the next update does not know of it; then scores that break.
Usage: refused_ranks.py CHECKPOINT OUTPUT key=value ..."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, make_batch
from tiny import make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import NonFiniteScores, ScoringView, UpdateFigures


def state_of(trainer: Any) -> list[torch.Tensor]:
    """This rank's parameters, and main weights, moments and step counts."""
    from megatron_antisd.parallel.optimizer_state import optimizer_slices

    kept = [p.detach().clone() for chunk in trainer.chunks for p in chunk.parameters()]
    for part in optimizer_slices(trainer.optimizer).values():
        kept += [part.main.detach().clone(), torch.tensor(part.step())]
        kept += [moment.clone() for moment in part.moments().values()] if part.step() else []
    return kept


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def numbers(figures: UpdateFigures) -> tuple[float, ...]:
    return tuple(getattr(figures, field.name) for field in dataclasses.fields(UpdateFigures))


def refused_between(trainer: Any) -> dict[str, Any]:
    """Updates of batches 0 and 1, with refused ones before, between and after."""
    asked: list[UpdateFigures] = []

    def answer(value: bool):
        return lambda figures: asked.append(figures) or value

    def refused(step: int, accept: bool, broken: bool = False) -> UpdateFigures:
        before, batch = state_of(trainer), make_batch(make_views(seed=step), step)
        if broken:  # a sequence that is in the loss
            batch.sequence_advantage[3] = float("nan")
        stats = trainer.step(batch, learning_rate=0.5, accept=answer(accept))
        assert stats.skipped and same(before, state_of(trainer)), "a refused update changed something"
        assert str(numbers(stats)) == str(numbers(asked[-1])), "what was asked about is not what is reported"
        assert stats.finite != broken
        return stats

    refused(2, False)
    first = trainer.step(make_batch(make_views(), 0), learning_rate=1e-3, accept=answer(True))
    refused(3, False)
    refused(4, True, broken=True)
    refused(4, False, broken=True)
    second = trainer.step(make_batch(make_views(), 1), learning_rate=1e-3)
    last = state_of(trainer)
    refused(5, False)
    assert len(asked) == 6, "asked once an update, and never where nothing asks"
    return {"stats": [numbers(first), numbers(second)], "skipped": [first.skipped, second.skipped], "state": last,
            "asked": str([numbers(figures) for figures in asked])}


def broken_scores(trainer: Any) -> list[Any]:
    """What scoring says of a response whose third token is broken, behind one that is whole."""
    views = [ScoringView(prompt_ids=(3, 4), response_ids=(5, 6, 9)), ScoringView(prompt_ids=(8, 4), response_ids=(5, 6, 9, 7, 5))]
    trainer.score(views)
    predicting = type(trainer)._predicting

    def break_token(self: Any, row: Any, hidden: torch.Tensor) -> torch.Tensor:
        return predicting(self, row, hidden).masked_fill((row.where == 3 + 2)[:, None], torch.nan)

    type(trainer)._predicting = break_token
    try:
        trainer.score(views)
        raise AssertionError("scoring went through")
    except NonFiniteScores as error:
        return [error.token, error.view, error.position, str(error)]
    finally:
        type(trainer)._predicting = predicting


def main() -> None:
    checkpoint, output, *overrides = sys.argv[1:]
    config = configuration(checkpoint, overrides)
    start_process_group(config.parallel.timeout_seconds)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=0)

    def trainer() -> Trainer:
        return Trainer(config, layout, describe(checkpoint, layout.tensor_size))

    plain = trainer()
    expected = [plain.step(make_batch(make_views(), step), learning_rate=1e-3) for step in range(2)]
    result = refused_between(trainer())
    assert same(result.pop("state"), state_of(plain)), "a refused update shows in a later one"
    result["expected"] = [numbers(stats) for stats in expected]
    result["broken"] = broken_scores(plain)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, result)
    if dist.get_rank() == 0:
        torch.save(found, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
