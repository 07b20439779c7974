"""The processes that share a conversion: this one alone, or all that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_antisd.config import ConfigError
from megatron_antisd.parallel.checkpoint_files import CheckpointError

TIMEOUT_SECONDS = 3600
T = TypeVar("T")


class ConvertError(RuntimeError):
    """A conversion that cannot be done; the message says why and what to do."""


class Ranks:
    """`rank` of `size`. Joins torchrun's process group where there is one to join."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            from megatron_antisd.parallel.layout import start_process_group

            start_process_group(TIMEOUT_SECONDS)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """Every rank's result of `action`. Bad input or a failing disk on one rank is a ConvertError on all."""
        if self.size == 1:
            return [_explained(action)]
        import torch.distributed as dist

        report: tuple[Any, str] = (None, "")
        try:
            report = (_explained(action), "")
        except ConvertError as error:
            report = (None, str(error))
        reports: list[tuple[Any, str]] = [report] * self.size
        dist.all_gather_object(reports, report)
        failed = {text: rank for rank, (_, text) in reversed(list(enumerate(reports))) if text}
        if failed:
            raise ConvertError("; ".join(text if len(failed) == 1 else f"rank {rank}: {text}" for text, rank in failed.items()))
        return [result for result, _ in reports]

    def on_main(self, action: Callable[[], T]) -> T:
        """Rank 0's result of `action`, which the others wait for."""
        return self.together(lambda: action() if self.is_main else None)[0]

    def close(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def _explained(action: Callable[[], T]) -> T:
    try:
        return action()
    except (ConfigError, CheckpointError) as error:
        raise ConvertError(str(error)) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ConvertError(f"{where}{error.strerror or error}") from error
