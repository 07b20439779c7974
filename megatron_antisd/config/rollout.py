"""The configuration keys of rollouts: sections rollout, routing, correction, noise_floor, tails, sync, servers, asynchrony."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_antisd.config.training import Section

BARE_OFF = BeforeValidator(lambda value: "off" if value is False else value)
"""YAML reads a bare `off` as false."""


class RolloutConfig(Section):
    engine: Literal["vllm", "megatron"] = "vllm"
    """Who generates: vLLM, or the training model itself."""
    mode: Literal["colocated", "servers"] = "colocated"
    """Where vLLM runs: inside the trainer's processes, or in servers on nodes of their own (`python -m megatron_antisd.serve`)."""
    problems_per_step: int = Field(32, ge=1)
    """Problems drawn a step."""
    group_size: int = Field(8, ge=2)
    """G. One rollout has no group to compare with, so at least 2."""
    max_new_tokens: int = Field(8192, ge=1)
    """Longest response; one that meets it is truncated."""
    max_context: int | None = Field(None, ge=2)
    """Prompt + response bound; None takes the model's."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature in training; scores use it too."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus in training. Below 1 the engine's log-probs are over the nucleus, the trainer's are not."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Engine TP; the rest of the world is replicas. With `mode: servers` that of each server."""
    expert_parallel: bool = False
    """Whole experts on each of an engine's tensor-parallel ranks, instead of a slice of every expert."""
    max_sequences: int = Field(256, ge=1)
    """Sequences an engine replica decodes at once."""
    memory_fraction: float = Field(0.45, gt=0, lt=1)
    """GPU memory share of the engine."""
    kv_cache_bytes: int | None = Field(None, ge=1 << 20)
    """Fixed KV cache size instead of a share; on CPU 256 MiB when unset."""
    sync_bucket_bytes: int = Field(512 << 20, ge=1 << 10)
    """Weights on their way to the engine at once: what a rank holds beside its shards during a sync (a larger tensor goes alone)."""
    ignore_eos: bool = False
    """Decode every response to `max_new_tokens`: for benchmarks with fixed lengths."""
    probe_max_mean: float | None = Field(None, gt=0)
    """Largest mean |engine - trainer log-prob| the probe after a weight sync accepts; None takes 1e-4 in float32, 0.1 in bfloat16."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of a broken engine in the life of this process, whatever step they fall in; the failure after that ends the run. 0: none."""
    stall_seconds: float = Field(300.0, gt=0)
    """An engine whose decoding step lasts longer than this has stopped answering and is restarted; below `supervision.generate_seconds`, which ends
    the run."""


class RoutingConfig(Section):
    replay: Annotated[Literal["auto", "engine", "scoring", "off"], BARE_OFF] = "auto"
    """Which experts the update uses: those the engine chose when it sampled (R3), those of the trainer's own scoring pass (R2), or its own anew.
    `auto`: the engine's for a mixture of experts in bfloat16 under vLLM, else off."""
    teacher: Literal["free", "student", "own"] = "free"
    """How the teacher routes response tokens: by itself, with the student's experts (biases u), or with those the engine chooses on the teacher's own
    prompt (one more prefill)."""
    sample_every: int = Field(10, ge=1)
    """Steps between measurements of the mismatch without replay, on a sample."""
    sample_rollouts: int = Field(8, ge=1)
    """Rollouts of that sample."""


class CorrectionConfig(Section):
    mode: Annotated[Literal["auto", "off", "truncate", "mask"], BARE_OFF] = "auto"
    """Importance weights trainer / engine probability against the mismatch of the two: `truncate` bounds them from above, `mask` drops what lies
    outside the bounds. `auto`: truncate where rollouts may be stale or the model is in bfloat16, else off."""
    level: Literal["token", "sequence"] = "token"
    """One weight a token, or one a response (the product of its tokens'; costs a scoring pass)."""
    upper: float = Field(2.0, gt=1)
    """Largest weight."""
    lower: float = Field(0.5, gt=0, lt=1)
    """Smallest weight that `mask` keeps."""


class NoiseFloorConfig(Section):
    limit: float | None = Field(None, gt=0)
    """Largest mean |u| under an empty privileged context, where u must be 0, that a run with a teacher makes its first update with, in nats; None
    takes 1e-4 in float32, 0.1 in bfloat16."""
    rollouts: int = Field(8, ge=1)
    """Rollouts of the first update that it is measured on."""


class TailsConfig(Section):
    oversample: float = Field(1.0, ge=1, le=4)
    """Groups that are started for each one that is needed; the slowest are given up when enough are complete, and their problems come again in their
    next epoch. Prefers problems with short answers."""
    dynamic_sampling: bool = False
    """Draw further problems in place of groups whose rewards are all equal, which leave the batch. AntiSD learns from those, GRPO does not."""
    dynamic_rounds: int = Field(3, ge=1)
    """With `dynamic_sampling`: rounds of generation a step at most; then the batch is filled up with equal groups."""
    overlong: Annotated[Literal["off", "mask", "penalty"], BARE_OFF] = "off"
    """Truncated responses out of the loss, or a penalty on the reward that grows over the last `overlong_buffer` tokens."""
    overlong_buffer: int = Field(4096, ge=1)
    """With `overlong: penalty`: tokens before `rollout.max_new_tokens` over which the penalty grows."""
    overlong_penalty: float = Field(1.0, gt=0)
    """With `overlong: penalty`: what a response at its limit loses."""
    schedule: Literal["given", "longest_first"] = "given"
    """Order of requests: as drawn, or by the lengths that earlier rollouts of each problem had, the longest first and spread evenly over engines."""


class SyncConfig(Section):
    checksum_tensors: int = Field(8, ge=0)
    """Tensors whose checksums trainer and engine compare after each sync, others each time; 0: only the probe."""
    transport: Literal["auto", "process_group", "shared_memory", "cuda_ipc"] = "auto"
    """How weights travel to engine servers: a process group of trainer and engine ranks (gloo on CPU, NCCL on GPUs), shared memory of one node
    (CPU), or handles on GPU memory (same GPU). `auto`: the process group."""
    timeout_seconds: float = Field(120.0, gt=0)
    """How long a peer may take to come to a transfer, or for one part of it; then the transfer broke off."""


class ServersConfig(Section):
    store: str = "127.0.0.1:29610"
    """HOST:PORT of the store where servers and trainer meet; rank 0 of the trainer opens it."""
    count: int = Field(1, ge=1)
    """Servers that the trainer waits for at its start; later ones are taken in at the next sync."""
    per_node: int | None = Field(None, ge=1)
    """Servers that the command starts on its node; None takes the node's GPUs / `rollout.tensor_parallel_size`, one on CPU."""
    token_file: str | None = None
    """File with the secret that every call must carry, at least 16 characters; None takes the variable ANTISD_SERVER_TOKEN."""
    address: str | None = None
    """IP address that a server listens on; None takes the one that leads to the store. Must be a private one."""
    start_seconds: float = Field(900.0, gt=0)
    """How long the trainer waits for `count` servers, and a server for the store."""
    heartbeat_seconds: float = Field(2.0, gt=0)
    """How often a server looks whether the trainer's store, and the command that started it, are there."""
    silence_seconds: float = Field(20.0, gt=0)
    """A call that a server does not answer for so long, beyond what it may take, shows that it is gone; its requests go to the others."""
    request_seconds: float = Field(1800.0, gt=0)
    """A request that takes longer than this counts as a failure of its server."""
    drain_seconds: float = Field(120.0, gt=0)
    """A server that is asked to end takes nothing new and finishes what is under way, for so long at most."""


class AsynchronyConfig(Section):
    max_staleness: int = Field(0, ge=0)
    """Policy versions that a rollout's oldest token may lie behind the weights it trains; generation runs so many steps ahead. 0: on-policy.
    Above 0 needs `rollout.mode: servers`."""
    partial: Literal["continue", "finish"] = "continue"
    """What a weight sync does with responses under way: stop them and go on with the new weights, or wait until they end."""
    replay: str | None = None
    """Run directory of an asynchronous run (`rollout_versions/`): cut every response where that run's syncs cut it, and so draw the same."""
