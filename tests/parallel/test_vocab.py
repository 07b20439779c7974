"""Vocabulary-parallel log-prob and entropy against a float64 oracle, on 1, 2 and 4 ranks; Megatron's main_grad; memory; errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from parallel.vocab_cases import CASES, Case, check, oracle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, log_prob_and_entropy
from megatron_antisd.parallel.vocab_loss import linear_policy_loss

HERE = Path(__file__).parent


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
                hidden=draw(1, 30) if number % 2 else None, scale=1.0, chunk_tokens=draw(1, 45), entropy_grad=number % 3 > 0,
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
    """Added in fp32 to what is there, and `.grad` is all zeros. Tolerance 1e-5 (sums of 11 tokens), for bf16 weights as well:
    on the CPU they are lifted to fp32 before the product."""
    torch.manual_seed(0)
    weight = fake_megatron_parameter(dtype, tied)
    hidden, targets = torch.randn(11, 6).to(dtype), torch.randint(0, 13, (11,))
    log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, None, 13, chunk_tokens=4)
    (log_prob.sum() + entropy.sum()).backward()

    plain = weight.detach().double().requires_grad_()
    want = oracle(hidden.double() @ plain[:13].t(), targets)
    (want[0].sum() + want[1].sum()).backward()
    assert weight.grad_added_to_main_grad is True
    assert weight.main_grad.dtype == torch.float32
    torch.testing.assert_close(weight.main_grad.double(), 2.0 + plain.grad, atol=1e-5, rtol=0)
    assert weight.grad is not None and weight.grad.dtype == dtype and not weight.grad.any()


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
        linear_log_prob_and_entropy(*given, targets, None, 8, chunk_tokens=2)[result].sum().backward()
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
    targets, flops = torch.randint(0, vocab, (tokens,)), []
    for training_form in (False, True):
        hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, size))
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocab, size), False
        with LargestTensor() as seen, FlopCounterMode(display=False) as counted:
            if training_form:
                loss, _, _ = linear_policy_loss(hidden, weight, targets, None, vocab, lambda rows, log_prob: -log_prob.sum(), chunk_tokens=chunk)
            else:
                loss = -linear_log_prob_and_entropy(hidden, weight, targets, None, vocab, entropy_grad=False, chunk_tokens=chunk)[0].sum()
            loss.backward()
        assert seen.elements == max(chunk * vocab, vocab * size, tokens * size)
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
    loss, log_prob, _ = linear_policy_loss(hidden, torch.randn(8, 6), torch.arange(11) % 8, None, 8, token_loss, chunk_tokens=4)
    loss.backward()
    assert seen == list(range(11)) and not hidden.grad.any() and log_prob.isfinite().all()


@pytest.mark.parametrize("main_grad", [False, True])
def test_linear_form_never_holds_all_logits(main_grad: bool) -> None:
    """Forward and backward touch no tensor above one chunk of logits, the weight, or the hidden states."""
    tokens, vocab, size, chunk = 512, 300, 8, 16
    hidden, weight = torch.randn(tokens, size, requires_grad=True), torch.nn.Parameter(torch.randn(vocab, size))
    if main_grad:
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocab, size), False
    targets = torch.randint(0, vocab, (tokens,))
    with LargestTensor() as seen:
        log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, None, vocab, chunk_tokens=chunk)
        (log_prob + entropy).sum().backward()
    assert seen.elements == max(chunk * vocab, vocab * size, tokens * size)
    assert seen.elements < tokens * vocab / 10
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
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        log_prob_and_entropy(logits, targets, None, 8, chunk_tokens=0)
    with pytest.raises(ValueError, match=r"weight is \(4, 8\)"):
        linear_log_prob_and_entropy(torch.randn(3, 4), torch.randn(4, 8), targets, None, 8)
    with pytest.raises(ValueError, match="torch.bfloat16"):
        linear_log_prob_and_entropy(torch.randn(3, 4).bfloat16(), torch.randn(8, 4), targets, None, 8)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            linear_log_prob_and_entropy(torch.randn(3, 4), torch.randn(8, 4), targets, None, 8, temperature=temperature)
