"""Run on 2 ranks: the linear form under Megatron's own DistributedDataParallel, the weight tied to an embedding or not.

The oracle is the same loss in float64 with the whole vocabulary, its gradient through plain autograd.
"""

from __future__ import annotations

import datetime
import itertools

import torch
import torch.distributed as dist

from megatron_antisd.compat import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

from megatron_antisd.parallel.vocab import linear_log_prob_and_entropy  # noqa: E402
from megatron_antisd.parallel.vocab_loss import linear_policy_loss  # noqa: E402

HIDDEN, COLUMNS, VOCAB, TOKENS = 8, 10, 17, 12


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    for tied, overlap, fused in itertools.product((False, True), repeat=3):
        check(tied, overlap, fused)
    dist.barrier()
    if dist.get_rank() == 0:
        print("main_grad agrees")
    dist.destroy_process_group()


def check(tied: bool, overlap: bool, fused: bool) -> None:
    torch.manual_seed(3)
    whole = torch.randn(2 * COLUMNS, HIDDEN)
    hidden, targets = torch.randn(2, TOKENS, HIDDEN), torch.randint(0, VOCAB, (2, TOKENS))  # two micro-batches
    mine = slice(dist.get_rank() * COLUMNS, (dist.get_rank() + 1) * COLUMNS)
    module = torch.nn.Linear(HIDDEN, COLUMNS, bias=False)
    module.weight.data.copy_(whole[mine])
    if tied:
        module.weight.zero_out_wgrad = True
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    ddp = DistributedDataParallel(config, ddp_config, module)
    ddp.zero_grad_buffer()
    group = parallel_state.get_tensor_model_parallel_group()
    with ddp.no_sync():
        loss(module.weight, hidden[0], targets[0], group, tied, fused).backward()
    loss(module.weight, hidden[1], targets[1], group, tied, fused).backward()
    ddp.finish_grad_sync()

    weight = whole.double().requires_grad_()
    for index in range(2):
        log_p = (hidden[index].double() @ weight[:VOCAB].t()).log_softmax(-1)
        total = log_p.gather(1, targets[index, :, None]).sum() - 0.3 * (log_p.exp() * log_p).sum() * (not fused)
        if tied:
            total = total + sum(weight[part][:4].pow(2).sum() for part in (slice(0, COLUMNS), slice(COLUMNS, None)))
        total.backward()
    assert module.weight.grad is None, "Megatron's hook should have taken .grad away"
    error = (module.weight.main_grad.double() - weight.grad[mine]).abs().max().item()
    assert error < 1e-5, f"tied={tied} overlap={overlap} fused={fused}: main_grad is off by {error:.2e}, tolerance 1e-5"


def loss(weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup, tied: bool, fused: bool) -> torch.Tensor:
    if fused:
        total, _, _ = linear_policy_loss(hidden, weight, targets, group, VOCAB, lambda rows, log_prob: log_prob.sum(), chunk_bytes=5 * 4 * COLUMNS)
    else:
        log_prob, entropy = linear_log_prob_and_entropy(hidden, weight, targets, group, VOCAB)
        total = log_prob.sum() + 0.3 * entropy.sum()
    # A second use of the weight through autograd, as a tied embedding has.
    return total + torch.nn.functional.embedding(torch.arange(4), weight).pow(2).sum() if tied else total


if __name__ == "__main__":
    main()
