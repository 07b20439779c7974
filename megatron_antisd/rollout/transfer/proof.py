"""What a vLLM model really holds of some tensors after new weights were loaded: checksums of its own parameters, read back as Hugging Face slices.

A parameter that the kernel keeps as it is loaded is read after everything is done. Those that a kernel packs for itself (on CPU every linear
layer and all experts, on GPUs the experts) are read from the module when its loaders are through and before it is packed; whether packing
went well is then the log-prob probe's to say. What was not loaded at all has no checksum.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_antisd.wire.boxes import Box, HeldPart
from megatron_antisd.wire.checksums import box_checksum

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight$")
_STACKED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass
class _Seen:
    """A tensor of the stream."""

    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype


class LoadedProof:
    """Open `watching` around the load, and pass the stream through `seeing`."""

    def __init__(self, model: torch.nn.Module, names: Sequence[str]) -> None:
        self._model, self._names = model, set(names)
        self._seen: dict[str, _Seen] = {}
        self._before_packing: dict[str, int] = {}

    def seeing(self, stream: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The stream as it is; remembers shapes and boxes, not values."""
        for name, tensor in stream:
            if name in self._names:
                box = tensor.held()[1] if isinstance(tensor, HeldPart) else Box.whole(tensor.shape)
                self._seen[name] = _Seen(tuple(tensor.shape), box, tensor.dtype)
            yield name, tensor

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Reads the modules that will be packed at the moment before."""
        wrapped = []
        for module, names in self._modules().items():
            method = getattr(module, "quant_method", None)
            if method is not None:
                wrapped.append((method, self._wrap(method, names)))
        try:
            yield
        finally:
            for method, _ in wrapped:
                del method.process_weights_after_loading  # the class's own comes back

    def checksums(self) -> dict[str, int]:
        """After the load. Tensors that this rank has nothing of, or that were not loaded, are missing."""
        found = dict(self._before_packing)
        for module, names in self._modules().items():
            for name in names:
                if name in self._seen and not _packs(module) and (value := self._read(module, name)) is not None:
                    found[name] = value
        return found

    def _modules(self) -> dict[torch.nn.Module, list[str]]:
        modules: dict[torch.nn.Module, list[str]] = {}
        for name in sorted(self._names):
            path = _module_path(name)
            try:
                module = self._model.get_submodule(path)
            except AttributeError:
                continue  # no such module: the tensor stays without a checksum, and that is a mismatch
            modules.setdefault(module, []).append(name)
        return modules

    def _wrap(self, method: Any, names: Sequence[str]) -> Any:
        original = method.process_weights_after_loading

        def read_then_process(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            for name in names:
                if name in self._seen and (value := self._read(layer, name)) is not None:
                    self._before_packing[name] = value
            return original(layer, *args, **kwargs)

        method.process_weights_after_loading = read_then_process
        return read_then_process

    def _read(self, module: torch.nn.Module, name: str) -> int | None:
        seen = self._seen[name]
        values = _slice_of(module, name, seen.box, len(seen.shape))
        if values is None or values.numel() != seen.box.numel:
            return None
        return box_checksum(values.to(seen.dtype), seen.box, seen.shape[1] if len(seen.shape) > 1 else 1)


def _module_path(name: str) -> str:
    expert = _EXPERT.match(name)
    if expert:
        return f"{expert[1]}.routed_experts"
    path, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{path}.{_STACKED.get(last, last)}" if path else last


def _packs(module: torch.nn.Module) -> bool:
    """Whether what the module holds after loading is in its kernel's own layout."""
    return hasattr(module, "w13_weight") or hasattr(module, "cpu_linear")


def _slice_of(module: torch.nn.Module, name: str, box: Box, dimensions: int) -> torch.Tensor | None:
    """The elements of `box` of the Hugging Face tensor in the module's parameter; None where they are not there."""
    expert = _EXPERT.match(name)
    if expert:
        local = module._map_global_expert_id_to_local_expert_id(int(expert[2]))
        if local < 0:
            return None
        stacked = (module.w2_weight if expert[3] == "down_proj" else module.w13_weight)[local]
        if expert[3] == "down_proj":
            return stacked[: box.rows, : box.columns]
        begin = stacked.shape[0] // 2 if expert[3] == "up_proj" else 0  # gate above up, each padded alike
        return stacked[begin : begin + box.rows, : box.columns]
    weight = module.weight
    if dimensions == 1:
        return weight
    if weight.dim() != 2:
        return None
    last = name.removesuffix(".weight").rpartition(".")[2]
    begin = 0
    if last in ("k_proj", "v_proj"):
        begin = weight.shape[0] - (2 if last == "k_proj" else 1) * box.rows
    elif last == "up_proj":
        begin = weight.shape[0] // 2
    return weight[begin : begin + box.rows, : box.columns]
