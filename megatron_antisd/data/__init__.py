"""Problems in, prompts and packed micro-batches out."""

from megatron_antisd.data.problems import load_problems
from megatron_antisd.data.rows import ProblemDataError
from megatron_antisd.data.sampler import ProblemSampler
from megatron_antisd.data.templates import PromptBuilder, PromptError, feedback_for, strip_thinking
from megatron_antisd.data.tokenizer import load_tokenizer, stop_token_ids

__all__ = ["ProblemDataError", "ProblemSampler", "PromptBuilder", "PromptError", "feedback_for", "load_problems", "load_tokenizer",
           "stop_token_ids", "strip_thinking"]
