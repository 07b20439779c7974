"""Boxes, stand-ins for tensors of which only a part is here, and checksums that add up."""

from __future__ import annotations

import pytest
import torch

from megatron_antisd.wire.boxes import Box, HeldPart
from megatron_antisd.wire.checksums import add, box_checksum

FULL = torch.arange(24.0).view(6, 4)
ROWS, COLUMNS = Box(2, 4, 0, 4), Box(0, 6, 1, 3)
WHOLE = Box.whole(FULL.shape)


def test_a_stand_in_gives_its_part_and_takes_no_memory() -> None:
    rows, columns = (HeldPart(WHOLE.cut(FULL, box), box, FULL.shape) for box in (ROWS, COLUMNS))
    assert rows.shape == FULL.shape and rows.dtype == FULL.dtype and rows.size(0) == 6
    assert torch.equal(rows.narrow(0, 2, 2), FULL[2:4]) and torch.equal(rows.narrow(0, 3, 1), FULL[3:4])
    assert torch.equal(columns.narrow(1, 1, 2), FULL[:, 1:3])
    assert torch.equal(rows.unsqueeze(0).unbind()[0].narrow(0, 2, 2), FULL[2:4]), "one expert as a list of experts"
    target = torch.zeros(2, 4)
    target.copy_(rows.narrow(0, 2, 2))
    assert torch.equal(target, FULL[2:4])


def test_a_vector_and_an_empty_part() -> None:
    vector = HeldPart(FULL.view(-1, 1)[4:8], Box(4, 8, 0, 1), (24,))
    assert torch.equal(vector.narrow(0, 4, 4), FULL.view(-1)[4:8])
    assert HeldPart(FULL[6:], Box(6, 6, 0, 4), FULL.shape).narrow(0, 6, 0).shape == (0, 4)


@pytest.mark.parametrize("use", [lambda t: t.narrow(0, 0, 2), lambda t: t.narrow(0, 2, 3), lambda t: t.narrow(1, 0, 2), lambda t: t[::2],
                                 lambda t: t + 1, lambda t: t.clone(), lambda t: torch.zeros(6, 4).copy_(t)])
def test_what_was_not_sent_is_never_read(use: object) -> None:
    with pytest.raises(RuntimeError, match="was sent"):
        use(HeldPart(FULL[2:4], ROWS, FULL.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_of_boxes_add_up(dtype: torch.dtype) -> None:
    tensor = torch.randn(70, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)  # more than a chunk
    whole = Box.whole(tensor.shape)
    boxes = [Box(0, 30, 0, 1000), Box(30, 70, 0, 300), Box(30, 70, 300, 1000)]
    total = box_checksum(tensor, whole, 1000)
    assert add(*(box_checksum(whole.cut(tensor, box), box, 1000) for box in boxes)) == total
    assert box_checksum(tensor.view(-1), Box(0, 70000, 0, 1), 1) == total, "a place counts, not the shape"


def test_checksums_see_bits_and_places() -> None:
    total = box_checksum(FULL, WHOLE, 4)
    flipped, negated = FULL.clone(), FULL.clone()
    flipped.view(torch.int32)[3, 1] ^= 1
    negated[0, 0] = -0.0
    changed = [flipped, negated, FULL.flip(0), FULL.flip(1), FULL[:, [0, 2, 1, 3]], FULL + 1, torch.zeros_like(FULL)]
    sums = [box_checksum(tensor, WHOLE, 4) for tensor in changed]
    assert len({total, *sums}) == len(changed) + 1
    assert box_checksum(FULL[2:4], ROWS, 4) != box_checksum(FULL[2:4], Box(3, 5, 0, 4), 4)
