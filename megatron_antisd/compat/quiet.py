"""Warnings of the libraries that say nothing to a user of this project."""

from __future__ import annotations

import warnings

_NOISE = (
    r"Transformer Engine and Apex are not installed",  # stated once by setup_env.sh; optimizer.backend decides
    r"Apex is not installed",
    r"full scope is deprecated",  # Megatron's own default value
    r"`torch\.distributed\..*` is deprecated",  # inside Megatron
    r"`sequence_parallel` is set to `True`, but tensor model parallel size is 1",  # experts with ETP 1 under TP > 1: as meant
    r"When using sequence parallelism it is recommended to set the environment variable",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor",  # Megatron's optimizer looks at its shards
)


def quiet_libraries() -> None:
    """Silence exactly these; anything new still shows."""
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
