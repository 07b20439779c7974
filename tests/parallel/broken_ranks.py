"""Hidden states that are not finite in the middle of a batch, on two ranks: scoring raises on both and names the response token, a training step is
skipped; the rank that has them names itself in its log. Usage: broken_ranks.py CHECKPOINT OUTPUT key=value"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, make_batch
from tiny import VOCAB, make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import ScoringView

BROKEN = VOCAB - 1
"""A token id that no view holds."""


def main() -> None:
    checkpoint, output, override = sys.argv[1:]
    config = configuration(checkpoint, [override])
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_antisd").addHandler(handler)
    layout = build_layout(config.parallel, seed=0)
    trainer = Trainer(config, layout, describe(checkpoint, layout.tensor_size))
    if layout.pipeline_rank == 0 and layout.tensor_rank == layout.tensor_size - 1:  # a rank that holds the id
        embedding = trainer.chunks[0].embedding.word_embeddings.weight
        embedding.data[BROKEN - layout.tensor_rank * embedding.shape[0]] = float("nan")
    views = list(make_views(vocab=BROKEN))
    views[-1] = ScoringView(prompt_ids=views[-1].prompt_ids, response_ids=(5, 6, BROKEN, 7, 8))
    try:
        trainer.score(views)
        raise AssertionError("scoring went through")
    except ValueError as error:
        message = str(error)
    stats = trainer.step(make_batch(tuple(views), 0), learning_rate=1e-3)
    found: list = [None, None]
    dist.all_gather_object(found, (message, lines, stats.skipped))
    if dist.get_rank() == 0:
        torch.save({"found": found, "first_token": sum(len(v.response_ids) for v in views[:-1])}, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
