"""The quickstart's base model: a tiny Qwen3-MoE pretrained by the project's own trainer, saved as an ordinary Hugging Face checkpoint.

    torchrun --standalone --nproc-per-node 2 -m examples.quickstart.make_base OUTPUT [--seed N]

Supervised learning is the policy-gradient step with every advantage 1 and lambda 0: its gradient is that of the mean log-prob. Three
stages: drills of the arithmetic, faultless deliberation, then the mix that makes a poor guesser who is able to deliberate.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from examples.quickstart import task
from examples.quickstart.tokenizer import END, build_tokenizer
from megatron_antisd.compat import megatron_cpu
from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.config import RunConfig, build_config
from megatron_antisd.records import ScoringView, TrainingBatch

if TYPE_CHECKING:
    from megatron_antisd.parallel.trainer import Trainer

PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`steps` updates on `batch` demonstrations each."""

    name: str
    steps: int
    batch: int
    mix: task.CorpusMix


STAGES = (
    Stage(name="drills", steps=250, batch=32, mix=task.DRILL_MIX),
    Stage(name="deliberation", steps=350, batch=64, mix=task.ARITHMETIC_MIX),
    Stage(name="mix", steps=350, batch=64, mix=task.CorpusMix()),
)


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeConfig:
    """764K parameters: 3 layers, hidden 128, 4 heads of 32 (the smallest vLLM takes on CPU), 2 key/value heads, 2 of 4 experts active."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], max_position_embeddings=256, rope_theta=10000.0, tie_word_embeddings=False, initializer_range=0.08,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)


def write_random_model(directory: Path, seed: int) -> None:
    """Random weights, config, tokenizer."""
    shutil.rmtree(directory, ignore_errors=True)
    tokenizer = build_tokenizer(task.words())
    torch.manual_seed(seed)
    Qwen3MoeForCausalLM(model_config(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def view_of(demonstration: tuple[str, str], tokenizer: PreTrainedTokenizerBase) -> ScoringView:
    """The chat prompt of the user's turn, and the response with its end token."""
    user, response = demonstration
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": user}], add_generation_prompt=True, return_dict=False)
    return ScoringView(prompt_ids=tuple(prompt), response_ids=tuple(tokenizer.encode(f"{response} {END}")))


def supervised_batch(views: Sequence[ScoringView]) -> TrainingBatch:
    """Advantage 1 everywhere, no teacher, on-policy: the update's gradient is that of the mean negative log-likelihood."""
    tokens = sum(len(view.response_ids) for view in views)
    return TrainingBatch(
        views=tuple(views), sequence_advantage=torch.ones(len(views)), sequence_mask=torch.ones(len(views), dtype=torch.bool),
        teacher_log_prob=torch.full((tokens,), float("nan")), teacher_mask=torch.zeros(tokens, dtype=torch.bool), old_log_prob=None,
        engine_log_prob=torch.zeros(tokens), lambda_=0.0, tokens=tokens)


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up, then a cosine to 5 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * max(0.05, cosine)


def pretrain(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, seed: int, *, show: bool) -> None:
    """All stages; equal seeds give equal data."""
    total = sum(stage.steps for stage in STAGES)
    bar = tqdm(total=total, desc="base model", disable=not show, mininterval=5)
    step = 0
    for number, stage in enumerate(STAGES):
        corpus = task.demonstrations(stage.mix, seed * len(STAGES) + number)
        for _ in range(stage.steps):
            views = [view_of(demonstration, tokenizer) for demonstration in itertools.islice(corpus, stage.batch)]
            stats = trainer.step(supervised_batch(views), learning_rate(step, total))
            step += 1
            bar.set_postfix_str(f"{stage.name}, {-float(stats.student.log_prob.mean()):.3f} nats a token", refresh=False)
            bar.update()
    bar.close()


def settings(model: Path) -> RunConfig:
    """Two data-parallel ranks, everything in one micro-batch."""
    return build_config({
        "model": {"path": str(model), "dtype": "float32"}, "data": {"train": ["none"]}, "algorithm": {"method": "grpo"},
        "optimizer": {"lr": PEAK_LEARNING_RATE}, "trainer": {"micro_batch_tokens": 1 << 20}})


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the quickstart's base model.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    from megatron_antisd.parallel.layout import build_layout, start_process_group

    quiet_libraries()
    start_process_group(timeout_seconds=120)
    initial = options.output.with_name(options.output.name + ".random")
    if dist.get_rank() == 0:
        write_random_model(initial, options.seed)
    dist.barrier()
    megatron_cpu.install()
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.reshard import save_huggingface
    from megatron_antisd.parallel.trainer import Trainer

    config = settings(initial)
    layout = build_layout(config.parallel, options.seed)
    trainer = Trainer(config, layout, describe(initial, layout.tensor_size))
    pretrain(trainer, build_tokenizer(task.words()), options.seed, show=layout.is_main)
    save_huggingface(trainer.export(), initial, options.output, write=layout.is_main)
    if layout.is_main:
        shutil.rmtree(initial)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
