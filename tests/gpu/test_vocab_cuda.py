"""Scoring on a GPU: bf16 matmuls with fp32 statistics against a float64 oracle. Needs torch alone."""

from __future__ import annotations

import pytest
import torch

from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, select_kernels
from megatron_antisd.parallel.vocab_loss import linear_policy_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

TOKENS, HIDDEN, VOCAB = 512, 256, 4096


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("training_form", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_scores_and_gradients_as_float64(dtype: torch.dtype, tolerance: float, training_form: bool, kernels: str) -> None:
    if kernels == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = 0.05 * torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    # The oracle starts from the rounded inputs: only the arithmetic is compared.
    h64, w64 = hidden.to(dtype).double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    table = (h64 @ w64.T).log_softmax(-1)
    expected = table.gather(1, targets[:, None])[:, 0]
    expected_entropy = -(table.exp() * table).sum(-1)
    (expected * upstream).sum().backward()
    h, w = hidden.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_()
    slope = upstream.cuda()
    if training_form:
        loss, log_prob, entropy = linear_policy_loss(
            h, w, targets.cuda(), None, VOCAB, lambda rows, part: (part * slope[rows]).sum(), chunk_bytes=100 * 4 * VOCAB,
            kernels=select_kernels(kernels))
    else:
        log_prob, entropy = linear_log_prob_and_entropy(h, w, targets.cuda(), None, VOCAB, entropy_grad=False, kernels=select_kernels(kernels))
        loss = (log_prob * slope).sum()
    loss.backward()
    assert (log_prob.double().cpu() - expected).abs().max() < tolerance
    assert (entropy.double().cpu() - expected_entropy).abs().max() < tolerance
    for mine, oracle in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert (mine.double().cpu() - oracle).norm() < tolerance * oracle.norm()
