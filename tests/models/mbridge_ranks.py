"""Ranks of the mbridge test: load a checkpoint as we do and as mbridge does, export as we do and as mbridge does, compare bitwise.

Usage: mbridge_ranks.py CHECKPOINT [key=value ...], the keys being fields of `ParallelConfig`. Rank 0 prints how much was compared, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.config import ModelConfig, ParallelConfig
from megatron_antisd.models import transformer_engine
from megatron_antisd.models.build import ModelDescription, PolicyModel, build_model, describe
from megatron_antisd.parallel.layout import ProcessLayout, build_layout, start_process_group
from megatron_antisd.parallel.reshard import WeightStream, load_huggingface


class Renamed(torch.nn.Module):
    """A chunk under the names of transformer-engine's layers, which are the only ones mbridge knows."""

    def __init__(self, chunk: PolicyModel, description: ModelDescription) -> None:
        super().__init__()
        self.decoder = chunk.decoder
        parameters = dict(chunk.named_parameters())
        layers, experts = range(len(chunk.decoder.layers)), range(description.experts or 0)
        self._renamed: dict[str, torch.nn.Parameter] = {}
        for weight in description.weights:
            theirs = transformer_engine.parameter_name(weight.megatron, moe=bool(experts))
            for layer in layers if "{layer}" in theirs else [None]:
                for expert in experts if weight.expert else [None]:
                    ours = weight.megatron.format(layer=layer, expert=expert)
                    if ours in parameters:
                        self._renamed[theirs.format(layer=layer, expert=expert)] = parameters.pop(ours)
        assert not parameters, f"not renamed: {sorted(parameters)}"

    def state_dict(self) -> dict[str, torch.nn.Parameter]:
        return self._renamed

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return iter(self._renamed.items())


def compare(checkpoint: str, description: ModelDescription, parallel: ParallelConfig, layout: ProcessLayout) -> dict[str, int]:
    """Raises AssertionError at the first difference; returns the numbers of parameters and tensors compared."""
    from mbridge import AutoBridge

    model = ModelConfig(path=checkpoint, dtype="float32")
    ours, theirs = build_model(description, model, parallel), build_model(description, model, parallel)
    load_huggingface(ours, description, layout, checkpoint)
    for chunk in theirs:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)

    bridge = AutoBridge.from_pretrained(checkpoint, dtype=torch.float32, make_vocab_size_divisible_by=parallel.tensor_parallel_size)
    # What its own model builder sets.
    bridge.vocab_size, bridge.padded_vocab_size = description.geometry.vocab_size, description.geometry.padded_vocab_size
    renamed = [Renamed(chunk, description) for chunk in theirs]
    with torch.no_grad():
        bridge.load_weights(renamed, checkpoint)
    loaded = 0
    for mine, other in zip(ours, theirs, strict=True):
        for (name, parameter), (_, reference) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(parameter, reference), f"{name}: not what mbridge loads"
            loaded += 1

    with torch.no_grad():
        reference = {name: tensor.clone() for name, tensor in bridge.export_weights(renamed)}
        exported = {name: tensor.clone() for name, tensor in WeightStream(ours, description, layout, bucket_bytes=64 << 10).stream()}
    assert exported.keys() == reference.keys(), sorted(exported.keys() ^ reference.keys())[:5]
    for name, tensor in exported.items():
        assert torch.equal(tensor, reference[name]), f"{name}: not what mbridge exports"
    return {"parameters": loaded, "tensors": len(exported)}


def main() -> None:
    checkpoint, *overrides = sys.argv[1:]
    parallel = ParallelConfig(**{key: int(value) for key, value in (text.split("=") for text in overrides)})
    start_process_group(60)
    megatron_cpu.install()
    layout = build_layout(parallel, seed=0)
    counts = compare(checkpoint, describe(checkpoint, layout.tensor_size), parallel, layout)
    if layout.is_main:
        print(json.dumps(counts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
