"""The configuration keys of the model and of how it is trained: sections model, parallel, optimizer, trainer."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """The configuration cannot run; the message names the key, the rule and what was given."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False)


class ModelConfig(Section):
    path: str
    """Directory of a Hugging Face checkpoint (config.json, safetensors, tokenizer), or of one of this project's checkpoints."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype of trainer and engine. Main weights, gradients and log-probs are fp32 in any case."""
    spec: Literal["local", "te"] = "local"
    """Layer implementation: `local` is torch only, `te` takes transformer-engine's layers."""
    grouped_experts: Literal["auto", "grouped", "sequential"] = "auto"
    """All experts in one product (torch's `grouped_mm`) or one after the other; `auto` groups on GPUs in bfloat16. With `spec: local` alone."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes anew instead of keeping them: none, those of `recompute_modules`, or of whole layers."""
    recompute_modules: tuple[Literal["attention", "mlp", "norms"], ...] | None = Field(None, min_length=1)
    """With `recompute: selective`: the core attention (None means it alone), the whole MLP or mixture-of-experts part, the two norms of a layer."""


class ParallelConfig(Section):
    tensor_parallel_size: int = Field(1, ge=1)
    """TP. With TP > 1 sequence parallelism is on."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """PP."""
    virtual_pipeline_size: int = Field(1, ge=1)
    """VPP: chunks of layers of each pipeline stage, which take turns (the interleaved schedule); needs PP > 1."""
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of each of the PP x VPP chunks, in the model's order; None divides as evenly as it goes, the first chunks taking the rest."""
    context_parallel_size: int = Field(1, ge=1)
    """CP: ranks that share the tokens of a row."""
    expert_parallel_size: int = Field(1, ge=1)
    """EP."""
    expert_tensor_parallel_size: int = Field(1, ge=1)
    """ETP: tensor parallelism inside an expert; independent of TP."""
    distributed_optimizer: bool = True
    """Shard main weights and moments over data- and context-parallel ranks."""
    overlap_gradients: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass of the last micro-batch still runs, bucket by bucket."""
    gradient_bucket_parameters: int | None = Field(None, ge=1)
    """With `overlap_gradients`: parameters in a bucket; None takes Megatron's 40 million, or a million a data-parallel rank where that is more."""
    timeout_seconds: int = Field(600, ge=10)
    """Time-out of collectives, and of a rank's wait for the slowest one in the rollout engine. In training at least that of the longest stage
    (`supervision`), which names the rank that is waited for; Megatron's groups round it up to minutes."""

    def chunk_layers(self, layers: int) -> tuple[int, ...]:
        """Layers of each of the PP x VPP chunks of a model of `layers`, in the model's order: chunk i stands on stage i modulo PP."""
        if self.pipeline_layers is not None:
            return self.pipeline_layers
        chunks = self.pipeline_parallel_size * self.virtual_pipeline_size
        return tuple(layers // chunks + (i < layers % chunks) for i in range(chunks))


class OptimizerConfig(Section):
    backend: Literal["torch", "te", "apex"] = "torch"
    """Whose AdamW: an error where the package is absent, never a silent substitute."""
    lr: float = Field(1e-6, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; one-dimensional parameters are spared."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's denominator term."""
    offload: bool = False
    """Keep AdamW's moments in host memory; they pass through the GPU parameter by parameter. With `backend: torch` alone."""
    clip_grad: float = Field(1.0, gt=0)
    """Global gradient norm bound."""
    warmup_steps: int = Field(0, ge=0)
    """Linear learning-rate warm-up, then constant."""
    max_skipped_in_a_row: int = Field(3, ge=1)
    """Updates that are not finite, or refused by `health`, are left out; after this many in a row the run stops."""


class TrainerConfig(Section):
    micro_batch_tokens: int = Field(16384, ge=1)
    """Upper bound of packed tokens in a micro-batch, over all context-parallel ranks (a longer single sequence is its own micro-batch)."""
    score_micro_batch_tokens: int = Field(32768, ge=1)
    """The same for scoring without gradient."""
    vocab_chunk_bytes: int = Field(512 << 20, ge=1)
    """fp32 logits that exist at once on a rank in the training step's output layer, at least one token's: 4 x vocabulary / TP bytes. Scoring
    without gradient holds a few MB of them, whatever this says."""
    vocab_kernels: Literal["torch", "triton"] = "torch"
    """Who works on logits between the products: torch's operators, or two Triton kernels (GPUs only; not measured yet, so not the default)."""
