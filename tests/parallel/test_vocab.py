"""Vocabulary-parallel log-prob and entropy against a float64 oracle, on 1, 2 and 4 ranks; Megatron's main_grad; memory; errors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from parallel.vocab_cases import CASES, Case, check, oracle, small_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_antisd.parallel import vocab_shard
from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, log_prob_and_entropy
from megatron_antisd.parallel.vocab_loss import linear_policy_loss
from megatron_antisd.parallel.vocab_shard import NonFiniteHiddenError, Shard

HERE = Path(__file__).parent
SIZES = {name: getattr(vocab_shard, name) for name in ("BLOCK_BYTES", "KEPT_BLOCK_BYTES", "BLOCK_COLUMNS", "BLOCK_TOKENS", "COLUMN_MULTIPLE")}


@pytest.fixture(autouse=True)
def default_blocks() -> Iterator[None]:
    """`small_blocks` changes this process; put back what it found."""
    yield
    for name, value in SIZES.items():
        setattr(vocab_shard, name, value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_rank_without_group(case: Case) -> None:
    check(case, None)


def test_groups_of_1_2_and_4_ranks() -> None:
    assert "worst scaled fp32 error" in run_ranks(HERE / "vocab_ranks.py", 4, timeout=150)


def test_main_grad_under_megatron_ddp() -> None:
    pytest.importorskip("megatron.core")
    assert "main_grad agrees" in run_ranks(HERE / "vocab_ddp_ranks.py", 2, timeout=150)


def test_random_shapes() -> None:
    """Forty random shapes, tolerance 5e-6 as in the fixed linear cases."""
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for number in range(40):
        vocab_size = draw(1, 90)
        check(
            Case(
                name=f"random {number}", tokens=draw(0, 40), vocab_size=vocab_size, padded=vocab_size + draw(0, 20),
                hidden=draw(1, 30) if number % 2 else None, scale=1.0, chunk_tokens=draw(1, 45), block_columns=draw(1, 60),
                entropy_grad=number % 3 > 0,
                temperature=0.5 + number / 20, tolerance=5e-6,
            ),
            None,
        )  # fmt: skip


def fake_megatron_parameter(dtype: torch.dtype, tied: bool) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.randn(16, 6).to(dtype))
    weight.main_grad = torch.full((16, 6), 2.0)
    weight.grad_added_to_main_grad = False
    weight.zero_out_wgrad = tied
    return weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_goes_into_main_grad(dtype: torch.dtype, tied: bool) -> None:
    """Added in fp32 to what is there; `.grad` is one zero in the weight's shape, or left to the embedding where the weight is tied.
    Tolerance 1e-5 (sums of 11 tokens), for bf16 weights as well:
    on the CPU they are lifted to fp32 before the product."""
    torch.manual_seed(0)
    weight = fake_megatron_parameter(dtype, tied)
    hidden, targets = torch.randn(11, 6).to(dtype), torch.randint(0, 13, (11,))
    log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, None, 13)
    (log_prob.sum() + entropy.sum()).backward()

    plain = weight.detach().double().requires_grad_()
    want = oracle(hidden.double() @ plain[:13].t(), targets)
    (want[0].sum() + want[1].sum()).backward()
    assert weight.grad_added_to_main_grad is True
    assert weight.main_grad.dtype == torch.float32
    torch.testing.assert_close(weight.main_grad.double(), 2.0 + plain.grad, atol=1e-5, rtol=0)
    if tied:
        assert weight.grad is None
    else:
        assert weight.grad.dtype == dtype and weight.grad.shape == weight.shape and not weight.grad.any()
        assert weight.grad.untyped_storage().nbytes() == dtype.itemsize, "no memory of the weight's size"


def test_no_tokens_still_tells_megatron() -> None:
    weight = fake_megatron_parameter(torch.float32, False)
    log_prob, _ = linear_log_prob_and_entropy(torch.randn(0, 6), weight, torch.zeros(0, dtype=torch.int64), None, 13)
    log_prob.sum().backward()
    assert weight.grad_added_to_main_grad is True and weight.main_grad.eq(2.0).all()


@pytest.mark.parametrize("result", [0, 1], ids=["log_prob", "entropy"])
def test_scalar_of_one_result_and_one_frozen_input(result: int) -> None:
    """The other result has no part in the gradient, the frozen input gets none. Tolerance 2e-6."""
    torch.manual_seed(1)
    leaves, targets = [torch.randn(5, 4), torch.randn(8, 4)], torch.tensor([0, 7, 3, 3, 1])
    whole = [leaf.double().requires_grad_() for leaf in leaves]
    oracle(whole[0] @ whole[1].t(), targets)[result].sum().backward()
    for trained in (0, 1):
        given = [leaf.clone().requires_grad_(index == trained) for index, leaf in enumerate(leaves)]
        linear_log_prob_and_entropy(*given, targets, None, 8)[result].sum().backward()
        torch.testing.assert_close(given[trained].grad.double(), whole[trained].grad, atol=2e-6, rtol=0)
        assert given[1 - trained].grad is None


def test_entropy_bounds() -> None:
    """Uniform: log V. One certain token: 0, never below, even at logits of 1e4. A NaN logit shows in its own row only."""
    targets = torch.zeros(3, dtype=torch.int64)
    logits = torch.full((3, 1000), 1e4)
    logits[1, 1:] = -1e4
    logits[2, 3] = math.nan
    log_prob, entropy = log_prob_and_entropy(logits, targets, None, 1000)
    assert entropy[0].item() == pytest.approx(math.log(1000), abs=1e-6)
    assert entropy[1].item() == 0.0 and log_prob[1].item() == 0.0
    assert entropy[2].isnan() and log_prob[2].isnan()


class LargestTensor(TorchDispatchMode):
    """The largest number of elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (torch's signature)
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_training_form_never_holds_all_logits_and_multiplies_once_less() -> None:
    tokens, vocab, size, chunk = 512, 300, 8, 16
    small_blocks(chunk, 100)
    targets, flops = torch.randint(0, vocab, (tokens,)), []
    for training_form in (False, True):
        hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, size))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocab, size), False
        with LargestTensor() as seen, FlopCounterMode(display=False) as counted:
            if training_form:
                loss, _, _ = linear_policy_loss(hidden, weight, targets, None, vocab, lambda rows, log_prob: -log_prob.sum(),
                                                chunk_bytes=4 * vocab * chunk)
            else:
                loss = -linear_log_prob_and_entropy(hidden, weight, targets, None, vocab, entropy_grad=False)[0].sum()
            loss.backward()
        assert seen.elements == max(chunk * vocab if training_form else 0, vocab * size, tokens * size)
        flops.append(counted.get_total_flops())
    assert flops[0] - flops[1] == 2 * tokens * vocab * size


def test_the_training_forms_loss_cannot_be_scaled_afterwards() -> None:
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(8, 6)
    loss, _, _ = linear_policy_loss(hidden, weight, torch.zeros(4, dtype=torch.int64), None, 8, lambda rows, log_prob: log_prob.sum())
    with pytest.raises(RuntimeError, match="scaled after its gradients were formed"):
        (2 * loss).backward()


def test_a_token_loss_sees_its_own_rows_once_and_in_order() -> None:
    seen: list[int] = []

    def token_loss(rows: slice, log_prob: torch.Tensor) -> torch.Tensor:
        assert log_prob.requires_grad and len(log_prob) == rows.stop - rows.start
        seen.extend(range(rows.start, rows.stop))
        return log_prob.sum() * 0.0

    hidden = torch.randn(11, 6, requires_grad=True)
    loss, log_prob, _ = linear_policy_loss(hidden, torch.randn(8, 6), torch.arange(11) % 8, None, 8, token_loss, chunk_bytes=4 * 8 * 4)
    loss.backward()
    assert seen == list(range(11)) and not hidden.grad.any() and log_prob.isfinite().all()


@pytest.mark.parametrize("main_grad", [False, True])
def test_linear_form_never_holds_all_logits(main_grad: bool) -> None:
    """Forward and backward touch no tensor above the weight or the hidden states: a block of logits is smaller here."""
    tokens, vocab, size = 512, 300, 8
    small_blocks(16, 100)
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, size))
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocab, size), False
    targets = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as seen:
        log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, None, vocab)
        (log_prob + entropy).sum().backward()
    assert seen.elements == max(vocab * size, tokens * size)
    assert seen.elements < tokens * vocab / 10
    weight.grad = None  # Megatron's hook would have
    with LargestTensor() as naive:
        (hidden @ weight.t()).log_softmax(-1).sum().backward()
    assert naive.elements >= tokens * vocab  # the measure does see materialised logits


def test_errors_say_what_was_expected() -> None:
    logits, targets = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"targets are \(2,\)"):
        log_prob_and_entropy(logits, targets[:2], None, 8)
    with pytest.raises(ValueError, match=r"expected \(3,\) torch.int64"):
        log_prob_and_entropy(logits, targets.int(), None, 8)
    with pytest.raises(ValueError, match="two dimensions"):
        log_prob_and_entropy(logits[None], targets, None, 8)
    with pytest.raises(ValueError, match="vocab_size is 9, but 1 rank"):
        log_prob_and_entropy(logits, targets, None, 9)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        log_prob_and_entropy(logits, targets, None, 0)
    with pytest.raises(ValueError, match="ids from 0 to 5; here they span 0 to 6"):
        log_prob_and_entropy(logits, torch.tensor([0, 6, 1]), None, 6)
    with pytest.raises(ValueError, match="here they span -1 to 0"):
        log_prob_and_entropy(logits, torch.tensor([0, -1, 0]), None, 8)
    with pytest.raises(ValueError, match=r"chunk_bytes is 31, too small for one token, whose logits take 32 bytes"):
        linear_policy_loss(torch.randn(3, 4), torch.randn(8, 4), targets, None, 8, lambda rows, part: part.sum(), chunk_bytes=31)
    with pytest.raises(ValueError, match=r"weight is \(4, 8\)"):
        linear_log_prob_and_entropy(torch.randn(3, 4), torch.randn(4, 8), targets, None, 8)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        linear_log_prob_and_entropy(torch.randn(3, 4).bfloat16(), torch.randn(8, 4), targets, None, 8)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            linear_log_prob_and_entropy(torch.randn(3, 4), torch.randn(8, 4), targets, None, 8, temperature=temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_states_that_are_not_finite_are_named(value: float, caplog: pytest.LogCaptureFixture) -> None:
    """Scoring raises; a training step, which is skipped as a whole when its loss is not finite, warns and goes on."""
    hidden, weight, targets = torch.randn(9, 4), torch.randn(8, 4), torch.zeros(9, dtype=torch.int64)
    hidden[5, 2] = hidden[7, 0] = value
    with pytest.raises(NonFiniteHiddenError, match="rank 0: hidden states are not finite, first in row 5 of 9") as caught:
        linear_log_prob_and_entropy(hidden, weight, targets, None, 8)
    assert caught.value.row == 5
    with caplog.at_level(logging.WARNING):
        loss, log_prob, _ = linear_policy_loss(hidden, weight, targets, None, 8, lambda rows, part: part.sum())
    assert "rank 0: hidden states are not finite, first in row 5 of 9" in caplog.text
    assert not loss.isfinite() and log_prob[:5].isfinite().all()


def test_blocks_cover_the_true_columns_once() -> None:
    for columns, true, rows in ((151_936, 151_936, 883), (96, 90, 100_000), (75_968, 75_968, 1), (10, 0, 5), (4096, 4095, 0)):
        shard = Shard(group=None, columns=columns, start=0, true_columns=true, vocab_size=max(true, 1))
        blocks = shard.blocks(rows, vocab_shard.BLOCK_BYTES["cpu"])
        assert [c for block in blocks for c in range(block.start, block.stop)] == list(range(true))
        widths = {block.stop - block.start for block in blocks[:-1]}
        most = max(vocab_shard.BLOCK_BYTES["cpu"] // (4 * max(rows, 1)), vocab_shard.BLOCK_COLUMNS) + vocab_shard.COLUMN_MULTIPLE
        assert len(widths) <= 1 and all(w <= most and w % vocab_shard.COLUMN_MULTIPLE == 0 for w in widths)
