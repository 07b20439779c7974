"""The two commands' flags."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_antisd.compat.quiet import quiet_libraries
from megatron_antisd.config import ConfigError, ParallelConfig
from megatron_antisd.convert.conversion import BUCKET_BYTES, Result
from megatron_antisd.convert.ranks import ConvertError
from megatron_antisd.convert.to_huggingface import convert_to_huggingface
from megatron_antisd.convert.to_megatron import convert_to_megatron

_LAYOUT = {
    "tensor-model-parallel-size": "tensor_parallel_size",
    "pipeline-model-parallel-size": "pipeline_parallel_size",
    "expert-model-parallel-size": "expert_parallel_size",
    "expert-tensor-parallel-size": "expert_tensor_parallel_size",
    "virtual-pipeline-model-parallel-size": "virtual_pipeline_size",
    "context-parallel-size": "context_parallel_size",
}
_CUTTING = {"tensor-model-parallel-size", "expert-tensor-parallel-size"}


def hf_to_megatron(arguments: Sequence[str] | None = None) -> int:
    """tools/convert_hf_to_megatron.py; the exit code."""
    parser = argparse.ArgumentParser(description="Convert a Hugging Face checkpoint (safetensors) to a checkpoint that any layout reads. Alone or "
                                     "under torchrun; the same command goes on where one was interrupted.")
    parser.add_argument("--hf-model", type=Path, required=True, metavar="DIR", help="folder with config.json and safetensors")
    _add_common(parser)
    for flag, key in _LAYOUT.items():
        effect = "tensors are cut for it" if flag in _CUTTING else "only held against the model"
        parser.add_argument(f"--{flag}", dest=key, type=_positive, default=1, metavar="N", help=f"layout to prepare for: {effect} (default 1)")
    given = parser.parse_args(arguments)
    layout = ParallelConfig(**{key: getattr(given, key) for key in _LAYOUT.values()})
    return _run(given, lambda: convert_to_megatron(given.hf_model, given.output, layout, verify=given.verify, bucket_bytes=given.bucket_mib << 20))


def megatron_to_hf(arguments: Sequence[str] | None = None) -> int:
    """tools/convert_megatron_to_hf.py; the exit code."""
    parser = argparse.ArgumentParser(description="Convert a training checkpoint, or a converted one, to a Hugging Face folder of sharded "
                                     "safetensors. Alone or under torchrun; the same command goes on where one was interrupted.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="a checkpoint, or a run directory: its newest whole one")
    _add_common(parser)
    parser.add_argument("--hf-model", type=Path, metavar="DIR", help="take configuration and tokenizer from here (default: from the checkpoint)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the output (default: the model's, a converted checkpoint's own)")
    given = parser.parse_args(arguments)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    return _run(given, lambda: convert_to_huggingface(given.checkpoint, given.output, given.hf_model, dtype=dtype, verify=given.verify,
                                                      bucket_bytes=given.bucket_mib << 20))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="must not exist")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare it bitwise with the source")
    parser.add_argument("--bucket-mib", type=_positive, default=BUCKET_BYTES >> 20, metavar="N",
                        help="weights in one file, read, written and resumed in one go (default %(default)s); a larger tensor is a file by itself")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _run(given: argparse.Namespace, convert: Callable[[], Result]) -> int:
    quiet_libraries()
    main, start = os.environ.get("RANK", "0") == "0", time.monotonic()
    try:
        result = convert()
    except (ConvertError, ConfigError) as error:
        if main:
            print("error:", " ".join(str(error).replace("model.path: ", "").split()), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {given.output}.incomplete", file=sys.stderr)
        return 130
    if main:
        if result.compared is not None:
            print(f"verified bitwise: {result.compared.tensors} tensors, {result.compared.nbytes} bytes")
        print(f"wrote {given.output}: {result.tensors} parameters, {result.nbytes / 1e9:.2f} GB in {result.parts} files, "
              f"{time.monotonic() - start:.1f} s")
    return 0
