"""Samples from an OLMo-3 in vLLM with its first weights and with others. Usage: vllm_olmo3.py FIRST SECOND OUTPUT

vLLM changes transformers' model class in its process, so what was sampled is held against transformers elsewhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

from megatron_antisd.config import RolloutConfig
from megatron_antisd.rollout.engine import Request, Sampling
from megatron_antisd.rollout.vllm_engine import VllmEngine


def main(first: Path, second: Path, output: Path) -> None:
    engine = VllmEngine(first, rollout=RolloutConfig(max_context=200, max_sequences=8, kv_cache_bytes=64 << 20), dtype="float32")
    requests = [Request(prompt_ids=tuple(token % 50 + 3 for token in range(length)), seed=length) for length in (5, 30, 150)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, ignore_eos=True, stop_token_ids=(2,))
    before = engine.generate(requests, sampling)
    engine.load_weights(iter(load_file(second / "model.safetensors").items()), version=1)
    after = engine.generate(requests, sampling)
    output.write_text(json.dumps([[[r.prompt_ids, g.response_ids, g.log_probs] for r, g in zip(requests, generations, strict=True)]
                                  for generations in (before, after)]))
    engine.close()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
