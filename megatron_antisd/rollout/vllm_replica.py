"""One vLLM inside this process: requests in, generations out, weights replaced, and nothing known of other replicas.

Log-probs are vLLM's `processed_logprobs`: those of the distribution a token was drawn from, log softmax(logits / temperature),
taken over the nucleus where top_p < 1. (Its default, `raw_logprobs`, ignores the temperature.) At temperature 1 and top_p 1,
the training default, they are the model's own log-probs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_antisd.compat import vllm_cpu
from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import EngineError, EngineFailure, Generation, MemoryUse, Request, Sampling
from megatron_antisd.rollout.stalls import StallWatch
from megatron_antisd.token_routes import TokenRoutes

CPU_KV_CACHE_BYTES = 256 << 20
EXTENSION = "megatron_antisd.rollout.transfer.worker.WeightReceiver"
"""What takes weights in, in each of vLLM's workers. By its name: the module is for processes that have vLLM."""


class SyncBroken(EngineError):
    """A weight transfer did not come to its end. `torn`: some weights are new and some are old; else the old ones are whole and in use."""

    def __init__(self, message: str, *, torn: bool) -> None:
        super().__init__(message)
        self.torn = torn


class VllmReplica:
    """Starts with `start`; whatever fails in it raises as it is, and what it then still holds is unknown."""

    max_context: int
    vocab_size: int
    on_cpu: bool

    def __init__(self, model_path: str | Path, arguments: dict[str, Any], *, stall_seconds: float) -> None:
        """`arguments`: see `engine_arguments`."""
        self._path, self._arguments, self._stall_seconds = str(model_path), arguments, stall_seconds
        self._expected = _checkpoint_names(Path(model_path))
        self._watch = StallWatch(stall_seconds)
        self._llm: Any = None
        self._tied = self._asleep = False
        self._routed: set[str] = set()

    def start(self) -> None:
        """Raises EngineError where vLLM is missing; whatever vLLM raises where it does not start."""
        vllm_cpu.prepare_environment()
        with vllm_cpu.engine_scope(), vllm_cpu.quiet_import():
            try:
                from vllm import LLM
                from vllm.platforms import current_platform
            except ImportError as error:
                raise EngineError("rollout.engine=vllm needs vLLM, which is not installed (vllm on a GPU, vllm-cpu without); "
                                  "run tools/setup_env.sh or set rollout.engine=megatron") from error
            vllm_cpu.install()
            self.on_cpu = current_platform.is_cpu()
            arguments = self._arguments | _device_arguments(self._arguments, self.on_cpu, self._stall_seconds)
            self._llm = LLM(model=self._path, **arguments)
        config = self._llm.llm_engine.model_config
        self.max_context, self.vocab_size = int(config.max_model_len), int(config.get_vocab_size())
        self._tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))

    @property
    def returns_routes(self) -> bool:
        """Whether it can say which experts a token went to."""
        return bool(self._arguments.get("enable_return_routed_experts"))

    # -- generation

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return self._llm.llm_engine.has_unfinished_requests()

    def add(self, name: str, request: Request, sampling: Sampling) -> None:
        """Raises EngineError where `sampling` asks for routes of an engine that was built without them."""
        if sampling.routes:
            if not self.returns_routes:
                raise EngineError("routes are asked for, but the engine was built without them (routing.replay)")
            self._routed.add(name)
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, _sampling_params(request.seed, sampling))

    def step(self) -> dict[str, Generation]:
        """One decoding step of all requests under way: those that are done by it. Raises EngineFailure where it does not end in `stall_seconds`."""
        with self._watch.step():
            outputs = self._llm.llm_engine.step()
        return {output.request_id: self._generation(output) for output in outputs if output.finished}

    def _generation(self, output: Any) -> Generation:
        generation = _generation(output.outputs[0])
        if output.request_id not in self._routed:
            return generation
        self._routed.remove(output.request_id)
        return dataclasses.replace(generation, routes=_routes(output))

    @contextlib.contextmanager
    def decoding(self) -> Iterator[None]:
        """Around every use of `add`, `step` and `stop`."""
        with vllm_cpu.engine_scope(), self._watch.watching():
            yield

    def stop(self, names: Iterable[str]) -> dict[str, Generation | None]:
        """Give up requests under way: what there is of each so far, None where there is no token yet. `truncated` is then False."""
        engine, parts = self._llm.llm_engine, {}
        for name in names:
            # An aborted request gives no output: its state is read before it goes. vLLM adds a random ending to the names it was given.
            (inner,) = engine.output_processor.external_req_ids[name]
            state = engine.output_processor.request_states[inner]
            parts[name] = _partial(state)
        engine.abort_request(list(parts))
        self._routed -= parts.keys()
        return parts

    # -- weights

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], check: Sequence[str] = ()) -> dict[str, int]:
        """See Engine.load_weights. Through vLLM's layer-wise reload, which redoes the packing of weights for its kernels; then
        the prefix cache is emptied: blocks computed with the old weights would be taken for the new ones' without any error. Returns this rank's
        checksums of the tensors `check`."""
        reader = _Reader(stream)
        failure: Exception | None = None
        checksums: dict[str, int] = {}
        try:
            with vllm_cpu.engine_scope():
                (checksums,) = self._llm.collective_rpc("load_stream", args=(iter(reader), check))
        except Exception as exception:
            failure = exception
        reader.drain()  # the stream is collective: leaving it early would leave the other ranks waiting in it
        if reader.failure is not None:
            raise EngineFailure(f"the weight stream broke off after {len(reader.names)} tensors: {type(reader.failure).__name__}: "
                                f"{reader.failure}") from reader.failure
        self._check_names(reader.names)  # the plainer message where names are the reason
        if failure is not None:
            raise failure
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])  # not before: trainer, two parts of the weights and the cache need not be there at once
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise EngineFailure("vLLM did not empty its prefix cache; the next prompts would be read with the old weights")
        return checksums

    def _check_names(self, names: Counter[str]) -> None:
        repeated = [name for name, count in names.items() if count > 1]
        optional = {"lm_head.weight"} if self._tied else set()
        if self._arguments["enable_expert_parallel"]:
            optional |= {name for name in self._expected or () if ".mlp.experts." in name}  # other ranks'
        expected = set(names) if self._expected is None else self._expected
        missing, unknown = expected - set(names) - optional, set(names) - expected - optional
        if not names or repeated or missing or unknown:
            raise EngineError(f"the weight stream of {len(names)} tensors does not fit the model's checkpoint: missing {_some(missing)}, "
                              f"unknown {_some(unknown)}, repeated {_some(repeated)}")

    def receive_weights(self, specification: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Of a replica that was started with `transfer.worker.EXTENSION`: take the trainer's weights in, on each of its ranks; their reports. Raises
        SyncBroken where the transfer broke off."""
        with vllm_cpu.engine_scope():
            reports = self._llm.collective_rpc("receive_weights", args=(specification,))
        errors = [report["error"] for report in reports if report["error"] is not None]
        if errors:
            states = self._llm.collective_rpc("weights_state")
            torn = any(state["torn"] is not None for state in states) or len({state["version"] for state in states}) > 1
            raise SyncBroken("; ".join(dict.fromkeys(errors)), torn=torn)
        if not self._llm.reset_prefix_cache():
            raise EngineFailure("vLLM did not empty its prefix cache; the next prompts would be read with the old weights")
        return reports

    # -- life cycle

    def sleep(self) -> MemoryUse | None:
        """See Engine.sleep. vLLM has no sleep mode on CPU. At level 2, which drops the weights: the next sync sends all of them anyway, and level 1
        would copy them to the host and back, and need as much pinned memory there. Not run."""
        if self.on_cpu or self._asleep:
            return None
        awake = _memory_in_use()
        self._llm.sleep(level=2)
        self._asleep = True
        return MemoryUse(awake=awake, asleep=_memory_in_use())

    def wake(self) -> None:
        """See Engine.wake. Room for the weights; the cache's comes when they are loaded."""
        if self._asleep:
            self._llm.wake_up(tags=["weights"])

    def close(self) -> None:
        """May be called twice, and where it never started."""
        llm, self._llm = self._llm, None
        try:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
        finally:
            llm = None
            vllm_cpu.forget_groups()  # those of an engine that did not get as far as having an end of its own
            gc.collect()


class _Reader:
    """Counts the names of a stream while it is read; `drain` reads what is left. `failure`: what the stream itself raised; it has then ended."""

    def __init__(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.names: Counter[str] = Counter()
        self.failure: Exception | None = None
        self._stream = iter(stream)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            try:
                name, tensor = next(self._stream)
            except StopIteration:
                return
            except Exception as error:
                self.failure = error
                raise
            self.names[name] += 1
            yield name, tensor

    def drain(self) -> None:
        if self.failure is None:
            with contextlib.suppress(Exception):  # remembered as `failure`
                for _ in self:
                    pass


def engine_arguments(
    rollout: RolloutConfig, *, dtype: str, seed: int, max_context: int | None, load_format: str, hf_overrides: dict[str, Any] | None, executor: str,
    routes: bool = False,
) -> dict[str, Any]:
    """vLLM's arguments; `executor` is its `distributed_executor_backend`. `routes`: the engine can say which experts tokens went to."""
    return {
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_context,
        "max_num_seqs": rollout.max_sequences,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enable_expert_parallel": rollout.expert_parallel,
        "worker_extension_cls": EXTENSION,
        "distributed_executor_backend": executor,
        "load_format": load_format,
        "hf_overrides": hf_overrides,
        "gpu_memory_utilization": rollout.memory_fraction,
        "kv_cache_memory_bytes": rollout.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "generation_config": "vllm",  # sampling comes from the run's configuration alone
        "enable_prefix_caching": True,
        "enable_return_routed_experts": routes,
        "use_tqdm_on_load": False,
    }


def _device_arguments(arguments: dict[str, Any], on_cpu: bool, stall_seconds: float) -> dict[str, Any]:
    if on_cpu:
        timeout = math.ceil(stall_seconds)
        return {"enforce_eager": True, "kv_cache_memory_bytes": arguments["kv_cache_memory_bytes"] or CPU_KV_CACHE_BYTES,
                "distributed_timeout_seconds": timeout, "cpu_distributed_timeout_seconds": timeout}
    return {"enable_sleep_mode": True}


def _memory_in_use() -> float:
    """GB of this process's GPU, whoever uses them."""
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


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


def _routes(output: Any) -> TokenRoutes:
    """Of a finished request. A token's experts are those of the pass that computed it, or of the one that filled the cache it was read from, which is
    emptied with every update."""
    completion = output.outputs[0]
    experts, inputs = completion.routed_experts, len(output.prompt_token_ids) + len(completion.token_ids) - 1
    if experts is None or experts.shape[0] != inputs:
        got = "no routes" if experts is None else f"routes of {experts.shape[0]} tokens"
        raise EngineFailure(f"vLLM returned {got}; expected those of {inputs}: a prompt of {len(output.prompt_token_ids)} and a response of "
                            f"{len(completion.token_ids)}, less the last token")
    try:
        return TokenRoutes.of(experts)
    except ValueError as error:
        raise EngineFailure(f"vLLM returned routes that cannot be used: {error}") from error


def _partial(state: Any) -> Generation | None:
    """Of the output processor's state of a request under way."""
    ids = tuple(state.detokenizer.output_token_ids)
    if not ids:
        return None
    log_probs = tuple(state.logprobs_processor.logprobs.logprobs)
    if len(log_probs) != len(ids) or not math.isfinite(sum(log_probs)):
        raise EngineFailure(f"vLLM holds {len(ids)} tokens and {len(log_probs)} log-probs with the sum {sum(log_probs)} of a request under way; "
                            "expected a finite log-prob of each")
    return Generation(response_ids=ids, log_probs=log_probs, truncated=False)


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
