"""Which experts each token of a sequence went to, as a value that travels with a response: from the engine to the trainer, and to disk."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

FREE = -1
"""Stands for every expert of a token that routes by itself."""
ITEM_BYTES = {"uint8": 1, "uint16": 2}


@dataclass(frozen=True, kw_only=True)
class TokenRoutes:
    """Experts of the tokens that a sequence puts into the model: prompt + response[:-1], since the last token is never an input.

    Example: `TokenRoutes.of(array)` of a `[tokens, layers, top_k]` array of logical expert ids, as vLLM returns it. An entry's order among the
    `top_k` says nothing. A model's dense layers count among the layers; what stands there is not read.
    """

    data: bytes = field(repr=False)
    """Expert ids of all tokens after the free ones, row by row: [tokens - free, layers, top_k]."""
    layers: int
    top_k: int
    dtype: str = "uint8"
    """Of `data`: uint8 or uint16."""
    free: int = 0
    """So many first tokens route by themselves."""

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES or min(self.layers, self.top_k) < 1 or self.free < 0:
            raise ValueError(f"routes of {self.layers} layers x {self.top_k} experts as {self.dtype} with {self.free} free tokens; expected at least "
                             f"one layer and expert, {' or '.join(ITEM_BYTES)}, and no negative number")
        if len(self.data) % self._row_bytes:
            raise ValueError(f"routes of {len(self.data)} bytes are no whole number of tokens: one has {self.layers} layers x {self.top_k} experts x "
                             f"{ITEM_BYTES[self.dtype]} bytes = {self._row_bytes}")

    @property
    def _row_bytes(self) -> int:
        return self.layers * self.top_k * ITEM_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """The free ones included."""
        return self.free + len(self.data) // self._row_bytes

    @staticmethod
    def of(experts: numpy.ndarray, *, free: int = 0) -> TokenRoutes:
        """From `experts` [tokens - free, layers, top_k], integers from 0 to 32767. Raises ValueError for another shape, type or range."""
        import numpy

        if experts.ndim != 3 or experts.dtype.kind not in "iu":
            raise ValueError(f"routes have shape {experts.shape} and type {experts.dtype}, expected integers [tokens, layers, top_k]")
        if experts.size and not 0 <= int(experts.min()) <= int(experts.max()) <= 32767:
            raise ValueError(f"routes hold expert ids from {experts.min()} to {experts.max()}, expected 0 to 32767")
        dtype = "uint8" if not experts.size or int(experts.max()) < 256 else "uint16"
        data = numpy.ascontiguousarray(experts, dtype=numpy.dtype(dtype).newbyteorder("<"))
        return TokenRoutes(data=data.tobytes(), layers=experts.shape[1], top_k=experts.shape[2], dtype=dtype, free=free)

    def array(self) -> numpy.ndarray:
        """[tokens, layers, top_k] int16; FREE throughout for a token that routes by itself."""
        import numpy

        fixed = numpy.frombuffer(self.data, dtype=numpy.dtype(self.dtype).newbyteorder("<")).reshape(-1, self.layers, self.top_k)
        routes = numpy.full((self.tokens, self.layers, self.top_k), FREE, dtype=numpy.int16)
        routes[self.free :] = fixed
        return routes

    def of_last(self, tokens: int, *, free: int) -> TokenRoutes:
        """The last `tokens` of these behind `free` ones that route by themselves. Raises ValueError where there are not so many."""
        bytes_ = tokens * self._row_bytes
        if bytes_ > len(self.data):
            raise ValueError(f"asked for the routes of the last {tokens} tokens of {self.tokens}, of which {self.free} have none")
        return TokenRoutes(data=self.data[len(self.data) - bytes_ :], layers=self.layers, top_k=self.top_k, dtype=self.dtype, free=free)


def json_bytes(value: object) -> str:
    """For `json.dumps(..., default=json_bytes)`: `data` as base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def routes_from_json(row: Mapping[str, Any] | None) -> TokenRoutes | None:
    """The inverse of `dataclasses.asdict` followed by `json.dumps(..., default=json_bytes)`."""
    return None if row is None else TokenRoutes(**{**row, "data": base64.b64decode(row["data"], validate=True)})
