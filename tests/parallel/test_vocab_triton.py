"""The Triton kernels against the torch ones, in Triton's interpreter: the arithmetic, not the speed or what a GPU's compiler makes of it.

Tolerance 1e-6 relative (sums in another order), for bf16 gradients one rounding.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (pip install triton)")

SCRIPT = Path(__file__).with_name("vocab_triton_cases.py")


def test_kernels_as_torchs() -> None:
    """In a process of its own: Triton decides about its interpreter when it is imported."""
    done = subprocess.run([sys.executable, str(SCRIPT)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    largest = float(done.stdout.split()[-1])
    assert math.isfinite(largest) and largest < 1e-6
