"""An engine process without HTTP: does what it is told through the store, one command after another.

    python sync_server.py PORT NAME MODEL TENSOR_PARALLEL_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core in this process; its workers are others where there are several
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else two workers want two NUMA nodes

from datetime import timedelta

import torch.distributed as dist


def build(model: str, size: int) -> Any:
    from megatron_antisd.compat import vllm_cpu

    vllm_cpu.prepare_environment()
    from vllm import LLM

    vllm_cpu.install()
    return LLM(model=model, dtype="float32", max_model_len=256, max_num_seqs=8, enforce_eager=True, kv_cache_memory_bytes=16 << 20,
               skip_tokenizer_init=True, tensor_parallel_size=size, distributed_executor_backend="mp" if size > 1 else "uni",
               worker_extension_cls="megatron_antisd.rollout.transfer.worker.WeightReceiver", load_format="dummy")


def act(llm: Any, command: dict[str, Any]) -> Any:
    """`call`: a method on every engine rank, each one's answer. `generate`: (ids, log-probs) of a prompt."""
    if command["do"] == "call":
        answers = llm.collective_rpc(command["method"], args=tuple(command["arguments"]))
        llm.reset_prefix_cache()
        return answers
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, logprobs=0, detokenize=False, seed=command["seed"])
    output = llm.generate({"prompt_token_ids": command["prompt"]}, sampling, use_tqdm=False)[0].outputs[0]
    return [list(output.token_ids), [next(iter(entry.values())).logprob for entry in output.logprobs]]


def main(port: int, name: str, model: str, size: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    llm = build(model, size)
    number = 0
    while True:
        command = json.loads(store.get(f"{name}/command/{number}"))
        if command["do"] == "end":
            return
        try:
            answer = {"answer": act(llm, command)}
        except Exception as error:  # goes to the test, which says what it expected
            answer = {"error": f"{type(error).__name__}: {error}"}
        store.set(f"{name}/answer/{number}", json.dumps(answer))
        number += 1


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
