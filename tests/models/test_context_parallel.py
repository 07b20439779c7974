"""Context-parallel attention: equal to one rank, forward and backward, and the work shared out evenly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import run_ranks

from megatron_antisd.models.attention import context_part


@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_one_rank(ranks: int) -> None:
    """Packed, causal, with a window, with trunks; values within 1e-12 and gradients within 1e-11 in float64."""
    assert "compared 18" in run_ranks(Path(__file__).with_name("context_ranks.py"), ranks)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("lengths", [[16384], [5000, 11384], [700] * 23 + [284]], ids=lambda lengths: f"{len(lengths)} sequences")
def test_ranks_share_the_work(lengths: list[int], size: int) -> None:
    """Keys that a rank's queries see, against a fair share: exactly fair for one long sequence, near it for packed ones."""
    seen = torch.cat([torch.arange(1, length + 1) for length in lengths])
    work = torch.stack([seen[context_part(len(seen), rank, size)].sum() for rank in range(size)]).double()
    assert work.max() / work.mean() <= {1: 1.0, 2: 1.35}.get(len(lengths), 1.15)
    contiguous = seen.view(size, -1).sum(1).double()
    if len(lengths) < 3:
        assert contiguous.max() / contiguous.mean() > 1.4, "contiguous parts would not be fair"


def test_every_token_is_somewhere_once() -> None:
    parts = torch.cat([context_part(48, rank, 4) for rank in range(4)])
    assert torch.equal(parts.sort().values, torch.arange(48))
    assert torch.equal(context_part(5, 0, 1), torch.arange(5))


def test_a_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 30 tokens cannot be shared by 4 context-parallel ranks: it must divide by 8"):
        context_part(30, 0, 4)
