"""What the training loop asks of a generation engine, whichever it is.

Every method is collective: all ranks of the world call it, in the same order, with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_antisd.token_routes import TokenRoutes


class EngineError(RuntimeError):
    """The engine cannot do what was asked, or it failed; raised on every rank with the same text."""


class EngineFailure(EngineError):
    """The engine broke or stopped answering; nothing is wrong with what it was asked. A new engine may do it (`RestartingEngine`)."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. Example: `Sampling(temperature=1.0, top_p=1.0, max_new_tokens=64, stop_token_ids=(2,))`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    ignore_eos: bool = False
    """Decode to `max_new_tokens` whatever is sampled: `stop_token_ids` are then plain tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response (the tokenizer's end token among them); the sampled one is the response's last token."""
    routes: bool = False
    """Whether generations say which experts their tokens went to; the engine must have been built for it."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise ValueError(f"expected temperature > 0, 0 < top_p <= 1 and max_new_tokens >= 1, got {self.temperature}, "
                             f"{self.top_p} and {self.max_new_tokens}")
        if not self.ignore_eos and not self.stop_token_ids:
            raise ValueError("no stop_token_ids: no response could ever end before max_new_tokens; give the tokenizer's "
                             "end token, or set ignore_eos")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to draw. The seed alone decides the draw: neither the other requests nor the replica enter."""

    prompt_ids: tuple[int, ...]
    seed: int
    """0 .. 2^63 - 1."""
    expected_tokens: int | None = None
    """How long the response may become, by earlier ones on the same problem; None: unknown. For schedulers; the draw does not depend on it."""
    place: int | None = None
    """The copy of the weights that must answer, modulo their number: for what asks all of them. None: any. Engines inside the trainer's processes
    pass over it: they divide requests in their order."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """When a generation may end early: `groups` groups of `group_size` consecutive requests are complete. The others are given up."""

    groups: int
    group_size: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One response."""

    response_ids: tuple[int, ...]
    """Sampled ids, the stop token included; at least one."""
    log_probs: tuple[float, ...]
    """Log-prob of each id under the distribution it was drawn from, `log softmax(logits / temperature)` (over the nucleus
    where top_p < 1), nats; as many as ids."""
    truncated: bool
    """True when `max_new_tokens` ended the response."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(policy version, number of ids) of each stretch drawn from one set of weights, in order; empty where all are of the engine's present one."""
    routes: TokenRoutes | None = None
    """Experts of prompt + response[:-1], all under the weights of the last span; None where `Sampling.routes` did not ask."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Of this rank's accelerator, all processes on it together, in GB (1e9 bytes)."""

    awake: float
    """While the engine had its weights and cache."""
    asleep: float


Finished = Callable[[Sequence[tuple[int, tuple[int, ...]]]], None]
"""Takes (index of the request, response ids) of responses that are done while others are still decoded."""


class Engine(Protocol):
    """Generation with weights that the trainer replaces after every update."""

    policy_version: int
    """The number of weight updates the present weights have seen."""
    replicas: int
    """Copies of the weights that answer independently of each other."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        """All generations, in the order of the requests, on every rank. The engine spreads the requests over its replicas (`spreading`).

        `finished` is called between decoding steps, with or without responses that are done; every response is reported on one rank.
        With a `quota` exactly its number of whole groups comes back and the requests of the others are None, though `finished` may have been told
        of some of them; without one nothing is None.
        Raises EngineError: a prompt that leaves no room for `max_new_tokens`, requests that differ between ranks; EngineFailure where it breaks.
        """
        ...

    def load_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int, check: Sequence[str] = ()) -> list[dict[str, int]] | None:
        """Replace all weights by `stream`: (Hugging Face name, full tensor or HeldPart of it), on every rank what its part of the engine needs.
        Returns for each rank checksums (`wire.checksums`) of what its engine then really holds of the tensors `check`, as far as it needs them;
        None where nothing was asked for.

        Producing the stream may be collective, so every rank reads it to its end even where its engine fails. Tensors stay
        unchanged until the call returns (the engine keeps references). Drops everything cached from the old weights.
        Raises EngineError for unknown, missing or repeated names, EngineFailure for what else goes wrong, shapes that do not fit among it.
        """
        ...

    def sleep(self) -> MemoryUse | None:
        """Give the accelerator's memory to the trainer. The weights are gone then: `load_weights` comes before the next `generate`. None where
        nothing was given, as on CPU."""
        ...

    def wake(self) -> None:
        """Undo `sleep`, before `load_weights`; nothing where it does not sleep."""
        ...

    def take_figures(self) -> dict[str, int]:
        """What happened since the last call, for the step's row."""
        ...

    def close(self) -> None:
        """Free the engine; the trainer's process groups stay. May be called twice."""
        ...


def check_requests(requests: Sequence[Request], sampling: Sampling, *, max_context: int, vocab_size: int) -> None:
    """Raises EngineError for the first request that cannot run: an empty prompt, one without room, an id outside the vocabulary."""
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        if length == 0:
            raise EngineError(f"request {index} has an empty prompt; at least one token is needed to sample from")
        if length + sampling.max_new_tokens > max_context:
            raise EngineError(
                f"request {index}: a prompt of {length} tokens + max_new_tokens {sampling.max_new_tokens} = "
                f"{length + sampling.max_new_tokens} exceeds the context of {max_context}; the longest prompt possible is "
                f"{max_context - sampling.max_new_tokens}: shorten it, lower rollout.max_new_tokens or raise rollout.max_context"
            )
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab_size:
            raise EngineError(f"request {index} has a token id outside 0..{vocab_size - 1}: {min(request.prompt_ids)}.."
                              f"{max(request.prompt_ids)}; the tokenizer does not belong to this model")
