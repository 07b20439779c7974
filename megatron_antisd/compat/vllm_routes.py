"""vLLM 0.32 returns the experts of every token (`enable_return_routed_experts`) from places where as shipped it cannot.

`install()` is called by `vllm_cpu.install()`, in every process that runs vLLM's code: the one that builds the engine and its workers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy


@dataclass(frozen=True)
class _StepBatch:
    """What vLLM's connector reads of a step: which rows of the step's tokens are whose."""

    req_ids: list[str]
    query_start_loc_np: numpy.ndarray
    """[requests + 1] first row of each request."""
    num_computed_tokens_np: numpy.ndarray
    """[requests] tokens of each that earlier steps computed, or a cache held."""


def install(*, cpu: bool) -> None:
    """Once a process. `cpu`: vLLM's CPU build, whose model runner is wired too; a GPU's has all of that itself."""
    _own_routes_on_every_launched_rank()
    if cpu:
        _admit_the_cpu_runner()
        _wire_the_cpu_runner()


def _own_routes_on_every_launched_rank() -> None:
    """Under `external_launcher` each tensor-parallel rank has a scheduler of its own, which expects its worker's routes; but vLLM's connector keeps
    them on the first rank alone, as where one scheduler listens to that rank, and the others end in an assertion. Every rank's routers choose
    from the same reduced hidden states, so what a rank has captured itself is right."""
    import vllm.distributed.aux_output_connector.worker as worker

    original, group = worker.AuxOutputWorkerConnector.__init__, worker.get_tp_group

    class First:
        is_first_rank = True

    @functools.wraps(original)
    def init(self: Any, *, vllm_config: Any, **kwargs: Any) -> None:
        launched = vllm_config.parallel_config.distributed_executor_backend == "external_launcher"
        worker.get_tp_group = First if launched else group
        try:
            original(self, vllm_config=vllm_config, **kwargs)
        finally:
            worker.get_tp_group = group

    worker.AuxOutputWorkerConnector.__init__ = init


def _admit_the_cpu_runner() -> None:
    """The configuration asks for the second model runner, which needs Triton; the CPU build has the first. Its other demands (a mixture of experts, a
    prefix cache, one pipeline stage) stand, so the question is answered with yes while it is asked."""
    from vllm.config.vllm import VllmConfig

    original = VllmConfig._verify_aux_output_compatibility

    @functools.wraps(original)
    def verify(self: Any) -> None:
        runner = VllmConfig.use_v2_model_runner
        VllmConfig.use_v2_model_runner = True
        try:
            original(self)
        finally:
            VllmConfig.use_v2_model_runner = runner

    VllmConfig._verify_aux_output_compatibility = verify


def _wire_the_cpu_runner() -> None:
    """The first model runner knows nothing of the connector. What the second one does with it is done around the first one's methods: it is made with
    the cache, told of a step before the step, given the step's captured rows after the forward pass, and asked for the outputs that go with
    the sampled tokens."""
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner

    start, execute, sample, shutdown = Runner.initialize_kv_cache, Runner.execute_model, Runner.sample_tokens, Runner.shutdown

    @functools.wraps(start)
    def initialize_kv_cache(self: Any, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any) -> None:
        start(self, kv_cache_config, is_profiling, **kwargs)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            self.routes = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    @functools.wraps(execute)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self.routes is None:
            return execute(self, scheduler_output, *args, **kwargs)
        self.routes_of_step = None
        self.routes.begin_step(scheduler_output.aux_output_connector_metadata)
        output = execute(self, scheduler_output, *args, **kwargs)
        if scheduler_output.total_num_scheduled_tokens:
            batch, count = self.input_batch, self.input_batch.num_reqs
            # Copies: sampling moves on in the same arrays.
            self.routes_of_step = self.routes.prepare_output(_StepBatch(
                list(batch.req_ids), self.query_start_loc.np[: count + 1].copy(), batch.num_computed_tokens_cpu[:count].copy()))
        return output

    @functools.wraps(sample)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = sample(self, *args, **kwargs)
        if self.routes is not None and self.routes_of_step is not None:
            pending, self.routes_of_step = self.routes_of_step, None
            counts = numpy.array([len(tokens) for tokens in output.sampled_token_ids])
            pending.enqueue_cpu_copy(counts, numpy.zeros_like(counts))  # no token is rejected: there is no speculation on CPU
            output.aux_output_connector_output = pending.process_output()
        return output

    @functools.wraps(shutdown)
    def end(self: Any) -> None:
        if self.routes is not None:
            self.routes.close()  # its thread would hold the store, as large as the cache deserves, as long as the process lives
            self.routes = None
        shutdown(self)

    Runner.routes = Runner.routes_of_step = None
    Runner.initialize_kv_cache, Runner.execute_model, Runner.sample_tokens, Runner.shutdown = initialize_kv_cache, execute_model, sample_tokens, end
