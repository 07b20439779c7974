"""A small real tokenizer (byte-level BPE with merges, ChatML template), prompts made with it, and graded groups."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_antisd.config import DataConfig, PrivilegedConfig
from megatron_antisd.data import PromptBuilder
from megatron_antisd.records import Problem, Rollout, RolloutGroup

RIGHT, WRONG = "Your answer is correct.", "Your answer is incorrect."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CORPUS = [
    "Your previous attempt:\n", "Previous assessment: Your answer is incorrect.\n\n", "Now solve this problem step by step.\n",
    "We add the numbers and get the answer, which is \\boxed{12}. So the answer is correct.\n\n", "Let x be the sum of 12 and 30.\n",
] * 4


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Merges across words' letters, single bytes for everything the corpus lacks (so one emoji is four tokens)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def builder(tokenizer: PreTrainedTokenizerFast, max_context: int = 4096, data: dict[str, Any] | None = None, **privileged: Any) -> PromptBuilder:
    return PromptBuilder(tokenizer, DataConfig(train=("x.jsonl",), **(data or {})), PrivilegedConfig(**privileged), max_context)


def group(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, float, bool]], solution: str | None = None, prompt: str = "2+2?",
          identifier: str = "p") -> RolloutGroup:
    """`rows`: text, reward, truncated."""
    rollouts = []
    for index, (text, reward, truncated) in enumerate(rows):
        ids = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
        rollouts.append(Rollout(problem_id=identifier, index=index, prompt_ids=(1,), response_ids=ids, engine_log_probs=(-1.0,) * len(ids),
                                truncated=truncated, policy_version=0, text=text).graded(reward, RIGHT if reward >= 1 else WRONG))
    return RolloutGroup(problem=Problem(id=identifier, prompt=prompt, answer="4", solution=solution), rollouts=tuple(rollouts))
