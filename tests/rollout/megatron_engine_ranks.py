"""Ranks of the in-process engine's test: generate, score what was generated, update, generate again; rank 0 writes what it got.

Usage: megatron_engine_ranks.py OUTPUT CHECKPOINT[,CHECKPOINT...] [parallel.key=value ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from finished import reported
from quotas import quota_facts
from tiny import VOCAB

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import build_config
from megatron_antisd.parallel.layout import build_layout, start_process_group
from megatron_antisd.records import ScoringView, TrainingBatch
from megatron_antisd.rollout.engine import EngineError, Generation, Quota, Request, Sampling

CONTEXT, NEW = 64, 12
PROMPT, SEEDS = (5, 9, 33), 4000
STOPS = (2, 7, 11, 23, 31, 40, 55)
FREE = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=NEW, stop_token_ids=STOPS)
FIXED = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=NEW, ignore_eos=True, stop_token_ids=STOPS)
GREEDY = Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=NEW, ignore_eos=True)
COLD = Sampling(temperature=1e-3, top_p=1.0, max_new_tokens=NEW, ignore_eos=True)
NUCLEUS = Sampling(temperature=0.7, top_p=0.8, max_new_tokens=NEW, stop_token_ids=STOPS)


def make_requests(count: int = 11) -> list[Request]:
    """Prompts of 1 to 24 tokens, the fourth and fifth alike, seeds of full width."""
    generator = torch.Generator().manual_seed(5)
    lengths = [1 + (7 * i) % 24 for i in range(count)]
    prompts = [tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()) for n in lengths]
    prompts[4] = prompts[3]
    return [Request(prompt_ids=prompt, seed=(1 << 62) + 1009 * i) for i, prompt in enumerate(prompts)]


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except EngineError as error:
        return str(error)
    return ""


def score(trainer: Any, requests: Sequence[Request], generations: Sequence[Generation]) -> torch.Tensor:
    views = [ScoringView(prompt_ids=r.prompt_ids, response_ids=g.response_ids) for r, g in zip(requests, generations, strict=True)]
    return trainer.score(views).log_prob


def update(trainer: Any, requests: Sequence[Request], generations: Sequence[Generation]) -> None:
    views = tuple(ScoringView(prompt_ids=r.prompt_ids, response_ids=g.response_ids) for r, g in zip(requests, generations, strict=True))
    tokens = sum(len(v.response_ids) for v in views)
    nothing = torch.zeros(tokens)
    trainer.step(TrainingBatch(
        views=views, sequence_advantage=torch.linspace(-1, 1, len(views)), sequence_mask=torch.ones(len(views), dtype=torch.bool),
        teacher_log_prob=nothing, teacher_mask=nothing.bool(), old_log_prob=None, engine_log_prob=nothing, lambda_=0.0, tokens=tokens), 0.05)


def one_token_each(trainer: Any) -> dict[str, list[int]]:
    """The first token of many responses to one prompt, neighbouring seeds, with and without a nucleus."""
    from megatron_antisd.rollout.megatron_engine import MegatronEngine

    engine = MegatronEngine(trainer, max_context=None, max_sequences=1024)
    requests = [Request(prompt_ids=PROMPT, seed=seed) for seed in range(SEEDS)]
    samplings = {"plain": Sampling(temperature=1.5, top_p=1.0, max_new_tokens=1, ignore_eos=True),
                 "nucleus": Sampling(temperature=1.5, top_p=0.7, max_new_tokens=1, ignore_eos=True)}
    return {name: [g.response_ids[0] for g in engine.generate(requests, sampling)] for name, sampling in samplings.items()}


def facts_of(trainer: Any) -> dict[str, Any]:
    from megatron_antisd.rollout.megatron_engine import MegatronEngine

    # Four slots for eleven requests, and rows of up to 30 prompt tokens: slots are used again, prompts take several rows.
    engine = MegatronEngine(trainer, max_context=CONTEXT, max_sequences=4, prefill_tokens=30)
    requests = make_requests()
    facts: dict[str, Any] = {name: engine.generate(requests, sampling) for name, sampling in
                             {"free": FREE, "fixed": FIXED, "greedy": GREEDY, "cold": COLD, "nucleus": NUCLEUS}.items()}
    facts["one_token"] = one_token_each(trainer) if dist.get_world_size() == 1 else None
    facts["free_score"] = score(trainer, requests, facts["free"])
    facts["wide"] = MegatronEngine(trainer, max_context=None, max_sequences=64).generate(requests[::-1], FREE)[::-1]
    generations, told, calls = reported(engine.generate, requests, FREE)
    facts["each_is_reported_once"] = sorted(told) == [(i, g.response_ids) for i, g in enumerate(generations)] and generations == facts["free"]
    facts["reported_while_decoding"] = min(calls) > 2
    facts["quota"] = quota_facts(engine, make_requests(12), FREE, Quota(groups=2, group_size=3))
    facts["alone"] = engine.generate(requests[2:3], FREE)
    facts["none"] = engine.generate([], FREE)
    facts["too_long"] = error_of(lambda: engine.generate([Request(prompt_ids=(1,) * 53, seed=0)], FREE))
    facts["foreign"] = error_of(lambda: engine.generate([Request(prompt_ids=(VOCAB,), seed=0)], FREE))
    facts["disagreement"] = error_of(lambda: engine.generate(requests[dist.get_rank():], FREE))
    facts["beyond_model"] = error_of(lambda: MegatronEngine(trainer, max_context=513, max_sequences=1))
    update(trainer, requests, facts["free"])
    facts["versions"] = [engine.policy_version]
    engine.load_weights(trainer.export(), version=1)
    facts["versions"].append(engine.policy_version)
    facts["updated"] = engine.generate(requests, FREE)
    facts["updated_score"] = score(trainer, requests, facts["updated"])
    facts["old_under_new"] = score(trainer, requests, facts["free"])
    if dist.get_rank() == dist.get_world_size() - 1:  # on one rank alone
        for parameter in (p for chunk in trainer.chunks for p in chunk.parameters()):
            parameter.data.fill_(float("nan"))
    facts["broken"] = error_of(lambda: engine.generate(requests, FREE))
    engine.close()
    engine.close()
    facts["closed"] = error_of(lambda: engine.generate(requests, FREE))
    return facts


def main() -> None:
    output, checkpoints, *overrides = sys.argv[1:]
    parallel: dict[str, Any] = {"timeout_seconds": 60}
    for text in overrides:
        key, value = text.split("=")
        parallel[key] = int(value)
    start_process_group(60)
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    result, layout = [], None
    for checkpoint in checkpoints.split(","):
        raw = {"model": {"path": checkpoint, "dtype": "float32"}, "data": {"train": ["none"]}, "parallel": parallel}
        layout = layout or build_layout(build_config(raw).parallel, seed=0)
        result.append(facts_of(Trainer(build_config(raw), layout, describe(checkpoint, layout.tensor_size))))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(facts["free"], facts["updated"], facts["broken"], facts["disagreement"]) for facts in result])
    assert all(other == everyone[0] for other in everyone), "ranks disagree"
    if dist.get_rank() == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
