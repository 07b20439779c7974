"""Cases for the vocabulary-parallel scores and their oracle: the whole vocabulary on one rank, in float64, through autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_antisd.parallel import vocab_shard
from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy, log_prob_and_entropy
from megatron_antisd.parallel.vocab_loss import linear_policy_loss


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    tokens: int = 13
    vocab_size: int = 37
    padded: int = 48
    """V_padded; divisible by every tensor-parallel size used."""
    hidden: int | None = None
    """None: from logits. A number: the linear form, of this hidden size."""
    scale: float = 3.0
    chunk_tokens: int = 5
    """Rows of a chunk or block; its columns come in blocks of `block_columns`."""
    block_columns: int = 11
    entropy_grad: bool = True
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    loss: bool = False
    """The training form: the loss with its gradients at once."""
    infinite: bool = False
    """Some logits are -inf: a few tokens', one whole rank's, one target's."""
    tolerance: float = 1e-6
    """Largest absolute error; relative to the largest magnitude where that exceeds 1."""
    grad_tolerance: float | None = None


CASES = [
    Case(name="logits"),
    Case(name="logits, one block", chunk_tokens=1024, block_columns=64),
    Case(name="logits, ranks of padding only", vocab_size=9, padded=16),
    Case(name="logits, one id", vocab_size=1, padded=4),
    Case(name="logits, no padding", vocab_size=64, padded=64),
    Case(name="logits, no tokens", tokens=0),
    Case(name="logits, wide", tokens=30, vocab_size=5003, padded=5120, chunk_tokens=8, block_columns=700),
    Case(name="logits of 1e4", scale=1e4),
    Case(name="logits, entropy cut", entropy_grad=False),
    Case(name="logits, -inf", infinite=True),
    Case(name="logits, bf16", dtype=torch.bfloat16, grad_tolerance=4e-3),
    Case(name="linear", hidden=24, scale=0.5, tolerance=5e-6),
    Case(name="linear, ranks of padding only", hidden=8, vocab_size=9, padded=16, tolerance=5e-6),
    Case(name="linear, no tokens", hidden=8, tokens=0),
    Case(name="linear, temperature", hidden=24, scale=0.5, temperature=0.6, tolerance=5e-6),
    Case(name="linear, entropy cut", hidden=24, scale=0.5, entropy_grad=False, tolerance=5e-6),
    Case(name="linear, wide", hidden=64, scale=0.3, tokens=40, vocab_size=5003, padded=5120, chunk_tokens=16, block_columns=512, tolerance=5e-6),
    Case(name="linear, logits of 1e4", hidden=24, scale=40.0, tolerance=5e-6),
    Case(name="linear, bf16", hidden=24, scale=0.5, dtype=torch.bfloat16, tolerance=5e-6, grad_tolerance=1e-2),
    Case(name="loss", hidden=24, scale=0.5, loss=True, tolerance=5e-6),
    Case(name="loss, ranks of padding only", hidden=8, vocab_size=9, padded=16, loss=True, tolerance=5e-6),
    Case(name="loss, no tokens", hidden=8, tokens=0, loss=True),
    Case(name="loss, temperature", hidden=24, scale=0.5, temperature=0.6, loss=True, tolerance=5e-6),
    Case(name="loss, wide", hidden=64, scale=0.3, tokens=40, vocab_size=5003, padded=5120, chunk_tokens=16, block_columns=512, loss=True,
         tolerance=5e-6),
    Case(name="loss, one chunk", hidden=24, scale=0.5, chunk_tokens=1024, block_columns=64, loss=True, tolerance=5e-6),
    Case(name="loss, logits of 1e4", hidden=24, scale=40.0, loss=True, tolerance=5e-6),
    Case(name="loss, bf16", hidden=24, scale=0.5, dtype=torch.bfloat16, loss=True, tolerance=5e-6, grad_tolerance=1e-2),
]


def oracle(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """logits `[T, vocab_size]` float64 -> log-prob `[T]`, entropy `[T]`, from torch's own log_softmax."""
    log_p = logits.log_softmax(dim=-1)
    terms = log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)
    return log_p.gather(1, targets[:, None]).squeeze(1), -terms.sum(dim=-1)


def small_blocks(tokens: int, columns: int) -> None:
    """Blocks as small as the cases are, for the rest of this process: their borders are what is tested. The defaults hold whole cases."""
    vocab_shard.BLOCK_TOKENS, vocab_shard.BLOCK_COLUMNS, vocab_shard.COLUMN_MULTIPLE = tokens, columns, 1
    vocab_shard.BLOCK_BYTES = vocab_shard.KEPT_BLOCK_BYTES = {"cpu": 4 * tokens * columns}


def check(case: Case, group: dist.ProcessGroup | None) -> float:
    """Hold one case against the oracle on the ranks of `group`, forward and backward; the largest scaled error."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    columns = case.padded // size
    generator = torch.Generator().manual_seed(17)
    leaves, targets, given = _inputs(case, generator)
    local = _local_leaves(case, leaves, slice(rank * columns, (rank + 1) * columns))
    before = [leaf.detach().clone() for leaf in local]
    weights = torch.randn(2, case.tokens, generator=generator)
    options = dict(entropy_grad=case.entropy_grad)
    small_blocks(case.chunk_tokens, case.block_columns)
    entropy_weights = weights[1] * (case.entropy_grad and not case.loss)
    loss = None
    if case.loss:
        loss, log_prob, entropy = linear_policy_loss(
            *local, targets, group, case.vocab_size, lambda rows, part: (weights[0][rows] * part).sum(), temperature=case.temperature,
            chunk_bytes=4 * columns * case.chunk_tokens)
    elif case.hidden is None:
        log_prob, entropy = log_prob_and_entropy(local[0], targets, group, case.vocab_size, **options)
    else:
        log_prob, entropy = linear_log_prob_and_entropy(
            *local, targets, group, case.vocab_size, temperature=case.temperature, **options
        )
    assert log_prob.dtype == entropy.dtype == torch.float32 and log_prob.shape == entropy.shape == (case.tokens,)
    assert (log_prob.requires_grad, entropy.requires_grad) == ((False, False) if case.loss else (True, case.entropy_grad))
    _assert_same_on_all_ranks(torch.stack([log_prob, entropy]).detach(), group)
    scalar = loss if loss is not None else (weights[0] * log_prob).sum() + (entropy_weights * entropy).sum()
    assert scalar.item() == pytest.approx(float((weights[0] * log_prob).sum() + (entropy_weights * entropy).sum()), rel=1e-5, abs=1e-5, nan_ok=True)
    scalar.backward()
    for leaf, copy in zip(local, before, strict=True):
        assert torch.equal(_bits(leaf), _bits(copy)), f"{case.name}: an input was changed"

    want_leaves = [leaf.double().requires_grad_() for leaf in given]
    logits = want_leaves[0] if case.hidden is None else want_leaves[0] @ want_leaves[1].t() / case.temperature
    want_log_prob, want_entropy = oracle(logits, targets)
    ((weights[0] * want_log_prob).sum() + (entropy_weights * want_entropy).sum()).backward()
    errors = [_error(log_prob, want_log_prob, case.tolerance, f"{case.name}: log_prob")]
    errors.append(_error(entropy, want_entropy, case.tolerance, f"{case.name}: entropy"))
    for index, (leaf, want) in enumerate(zip(local, want_leaves, strict=True)):
        expected = _local_gradient(case, index, want.grad, rank, columns)
        tolerance = case.grad_tolerance or case.tolerance
        assert leaf.grad.dtype == case.dtype
        errors.append(_error(leaf.grad, expected, tolerance, f"{case.name}: gradient {index}"))
    return max(errors) if case.dtype == torch.float32 else 0.0


def _inputs(case: Case, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """The padded whole tensors, with NaN as padding so that reading it shows; the targets; the true part for the oracle."""
    targets = torch.randint(0, case.vocab_size, (case.tokens,), generator=generator)
    if case.hidden is None:
        whole = (torch.randn(case.tokens, case.padded, generator=generator) * case.scale).to(case.dtype)
        if case.infinite:
            whole[2, ::3] = -math.inf
            whole[3, : case.padded // 2] = -math.inf  # whole shards of -inf on several ranks
            targets[3] = case.vocab_size - 1
            targets[4] = 5
            whole[4, 5] = -math.inf
        whole[:, case.vocab_size :] = math.nan
        return [whole], targets, [whole[:, : case.vocab_size]]
    hidden = torch.randn(case.tokens, case.hidden, generator=generator).to(case.dtype)
    weight = (torch.randn(case.padded, case.hidden, generator=generator) * case.scale).to(case.dtype)
    if case.scale > 10:  # exact products: the oracle's logits and ours are then the same numbers, though large
        hidden, weight = hidden.round(), weight.round()
    weight[case.vocab_size :] = math.nan
    return [hidden, weight], targets, [hidden, weight[: case.vocab_size]]


def _local_leaves(case: Case, leaves: list[torch.Tensor], columns: slice) -> list[torch.Tensor]:
    parts = [leaves[0][:, columns]] if case.hidden is None else [leaves[0], leaves[1][columns]]
    return [part.clone().requires_grad_() for part in parts]


def _local_gradient(case: Case, index: int, want: torch.Tensor, rank: int, columns: int) -> torch.Tensor:
    """This rank's part of the oracle's gradient, zeros in the padding."""
    if case.hidden is not None and index == 0:
        return want
    vocabulary_last = want if case.hidden is None else want.t()
    padded = torch.nn.functional.pad(vocabulary_last, (0, case.padded - case.vocab_size))[:, rank * columns : (rank + 1) * columns]
    return padded if case.hidden is None else padded.t()


def _error(got: torch.Tensor, want: torch.Tensor, tolerance: float, what: str) -> float:
    got, want = got.detach().double(), want.detach()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return 0.0
    error = ((got - want)[finite].abs().max() / want[finite].abs().max().clamp(min=1.0)).item()
    assert error <= tolerance, f"{what}: error {error:.2e}, tolerance {tolerance:.0e}"
    return error


def _assert_same_on_all_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    if group is None or tensor.numel() == 0:
        return
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, tensor, group=group)
    for other in gathered:
        assert torch.equal(_bits(other), _bits(tensor)), "ranks hold different results"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)
