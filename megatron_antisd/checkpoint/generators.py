"""Random number generators of a rank: Python's, numpy's, torch's on every device, and Megatron's own streams."""

from __future__ import annotations

import hashlib
import random

import numpy
import torch
from megatron.core import tensor_parallel

from megatron_antisd.parallel.layout import ProcessLayout, seed_generators


def generator_states(layout: ProcessLayout) -> dict[str, torch.Tensor]:
    """Name -> state, copies of fixed shapes."""
    states = {"torch": torch.get_rng_state(), "python": _python_state(), "numpy": _numpy_state()}
    if layout.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(layout.device)
    return states | {f"megatron.{name}": state.clone() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()}


def set_generator_states(layout: ProcessLayout, states: dict[str, torch.Tensor]) -> None:
    """Undo whatever was drawn since `generator_states`."""
    torch.set_rng_state(states["torch"])
    if "python" in states:
        _set_python_state(states["python"])
        _set_numpy_state(states["numpy"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], layout.device)
    tracker = {name.removeprefix("megatron."): state for name, state in states.items() if name.startswith("megatron.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)


def derive_generators(seed: int, step: int) -> None:
    """Start every generator of this rank anew from (run.seed, step), as a run that is resumed on another layout does: there is no rank there whose
    state could be taken over. Megatron's streams differ between tensor- and expert-parallel ranks by offsets of its own, as at a run's start."""
    seed_generators(derived_seed(seed, step))


def derived_seed(seed: int, step: int) -> int:
    """Below 2^31; another one at every step."""
    digest = hashlib.blake2b(f"{seed}/{step}/another layout".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _python_state() -> torch.Tensor:
    """[628] float64: exact, for the generator's words have 32 bits."""
    version, words, normal = random.getstate()
    return torch.tensor([version, *words, normal is not None, normal or 0.0], dtype=torch.float64)


def _set_python_state(state: torch.Tensor) -> None:
    version, *words, has_normal, normal = state.tolist()
    random.setstate((int(version), tuple(map(int, words)), normal if has_normal else None))


def _numpy_state() -> torch.Tensor:
    """[627] float64."""
    _, words, position, has_normal, normal = numpy.random.get_state()
    return torch.tensor([*words.tolist(), position, has_normal, normal], dtype=torch.float64)


def _set_numpy_state(state: torch.Tensor) -> None:
    *words, position, has_normal, normal = state.tolist()
    numpy.random.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), int(position), int(has_normal), normal))
