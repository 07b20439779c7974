"""AdamW with its moments in host memory against torch's, bit for bit; in a trainer, with checkpoints, in test_layouts.py and test_checkpoint.py."""

from __future__ import annotations

import pytest
import torch

from megatron_antisd.parallel.offload import MOMENTS, OffloadedAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_() for shape in ((7, 5), (3,), (4, 4))]


def groups(given: list[torch.Tensor]) -> list[dict]:
    return [{"params": given[:1], "weight_decay": 0.1}, {"params": given[1:], "weight_decay": 0.0}]


def test_bitwise_as_torchs() -> None:
    """Over steps with changing learning rates, one of them without a gradient for a parameter."""
    theirs, ours = parameters(), parameters()
    reference, optimizer = torch.optim.AdamW(groups(theirs), lr=1e-2, betas=(0.9, 0.95)), OffloadedAdamW(groups(ours), lr=1e-2, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(*mine.shape, generator=generator).to(DEVICE)
            mine.grad, other.grad = (None, None) if step == 2 and mine.dim() == 1 else (gradient, gradient.clone())
        for each in (reference, optimizer):
            for group in each.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            each.step()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
            for key in (*MOMENTS, "step"):
                assert torch.equal(optimizer.state[mine][key].cpu(), reference.state[other][key].cpu())
    assert len(optimizer.param_groups) == 2, "the groups are whole again"


def test_moments_stay_in_their_host_memory() -> None:
    given = parameters()
    optimizer = OffloadedAdamW(given, lr=1e-2)
    places = []
    for _ in range(2):
        for parameter in given:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        places.append([optimizer.state[parameter][key].data_ptr() for parameter in given for key in MOMENTS])
        for parameter in given:
            assert all(optimizer.state[parameter][key].device.type == "cpu" for key in MOMENTS)
            assert all(optimizer.state[parameter][key].is_pinned() == torch.cuda.is_available() for key in MOMENTS)
    assert places[0] == places[1]


def test_groups_are_whole_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    given = parameters()
    optimizer = OffloadedAdamW(groups(given), lr=1e-2)
    given[0].grad = torch.ones_like(given[0])

    def fail(self: torch.optim.AdamW) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(RuntimeError, match="no more"):
        optimizer.step()
    assert len(optimizer.param_groups) == 2


def test_what_it_is_not() -> None:
    with pytest.raises(ValueError, match="coupled weight decay"):
        OffloadedAdamW(parameters(), adam_w_mode=False)
    with pytest.raises(ValueError, match="no closure"):
        OffloadedAdamW(parameters()).step(lambda: None)
