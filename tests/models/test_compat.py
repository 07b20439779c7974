"""The repairs of Megatron-Core that GPUs need too."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
torch.cuda.is_available = lambda: True
from megatron_antisd.compat import megatron_cpu
before = torch.cuda.current_device
megatron_cpu.install()
import megatron.core.transformer.moe.moe_utils as moe_utils
assert hasattr(moe_utils, "te_general_gemm"), "the router's path names what is not defined"
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
repaired = CheckpointWithoutOutput.__init__
megatron_cpu.install()
assert CheckpointWithoutOutput.__init__ is repaired, "repaired once"
assert CheckpointWithoutOutput().fp8 is False and CheckpointWithoutOutput(fp8=True).fp8 is True, "norms would ask transformer-engine"
assert torch.cuda.current_device is before and not megatron_cpu._installed, "nothing else may be replaced where CUDA is there"
"""


def test_router_and_norms_work_without_transformer_engine_where_cuda_is_there() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
