"""Ranks of the checkpoint test: take steps, save on the way, or resume and go on; rank 0 writes what it got.

Usage: checkpoint_ranks.py MODEL CHECKPOINTS OUTPUT FIRST LAST OTHER_MODEL [key=value ...]

FIRST 0 starts anew and saves after every step, in the background, keeping three and even
ones. Another FIRST resumes from that step's checkpoint. With an
OTHER_MODEL ("-" for none) a trainer of that model must refuse the checkpoint and stay as it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from layout_ranks import configuration, make_batch
from tiny import make_views

from megatron_antisd.compat import megatron_cpu
from megatron_antisd.parallel.layout import build_layout, start_process_group


def main() -> None:
    model, directory, output, first, last, other, *overrides = sys.argv[1:]
    config = configuration(model, [*overrides, "checkpoint.keep=3", "checkpoint.keep_every=2"])
    start_process_group(config.parallel.timeout_seconds)
    megatron_cpu.install()
    from megatron_antisd.checkpoint import CheckpointWriter, load_checkpoint
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    layout = build_layout(config.parallel, seed=int(first))  # resumed generators must not owe their state to the seed
    if other != "-":
        refuse_other_model(configuration(other, overrides), layout, Path(directory) / f"step_{int(first):06d}")
    trainer = Trainer(config, layout, describe(model, layout.tensor_size))
    writer = CheckpointWriter(Path(directory), trainer)
    result: dict = {"steps": [], "draws": []}
    if int(first):
        result["state"] = load_checkpoint(Path(directory) / f"step_{int(first):06d}", trainer)
        result["loaded"] = weights(trainer)
    for step in range(int(first), int(last)):
        stats = trainer.step(make_batch(make_views(), step), learning_rate=1e-3 * (step + 1))
        result["steps"].append((stats.loss, stats.grad_norm))
        if not int(first):
            result["draws"].append(draws())
            writer.save(step + 1, {"step": step + 1, "gate": {"open": None, "entropy": 0.1 + 0.2}})  # goes on beside the next step
            result[f"weights-{step + 1}"] = weights(trainer)
    if not int(first):
        refuse_unwritable_state(writer, int(last) + 1)
    result["draws"].append(draws())
    result["final"] = weights(trainer)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result["steps"], result["draws"]))
    result["everyone"] = everyone
    if dist.get_rank() == 0:
        torch.save(result, output)
    dist.barrier()
    dist.destroy_process_group()


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.export()}


def draws() -> tuple[float, float]:
    """A number of torch's generator and one of Megatron's own, as every rank has them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    plain = float(torch.rand(()))
    with get_cuda_rng_tracker().fork():
        return plain, float(torch.rand(()))


def refuse_other_model(config, layout, checkpoint: Path) -> None:
    from megatron_antisd.checkpoint import CheckpointError, load_checkpoint
    from megatron_antisd.models.build import describe
    from megatron_antisd.parallel.trainer import Trainer

    stranger = Trainer(config, layout, describe(config.model.path, layout.tensor_size))
    before = weights(stranger)
    try:
        load_checkpoint(checkpoint, stranger)
    except CheckpointError as error:
        assert "moe_intermediate_size: 48 in the checkpoint, 32 here" in str(error), error
        assert "rope: " in str(error) and "hidden_size" not in str(error), error
    else:
        raise AssertionError("another model's checkpoint was loaded")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(stranger).items())


def refuse_unwritable_state(writer, step: int) -> None:
    """The failure of rank 0 reaches every rank, at the next call, and leaves no checkpoint and nothing in the next one's way."""
    from megatron_antisd.checkpoint import CheckpointError, latest_checkpoint

    writer.wait()
    writer.save(step, {"value": object()})
    try:
        writer.wait()
    except CheckpointError as error:
        assert "not JSON serializable" in str(error) and "rank 0" in str(error), error
    else:
        raise AssertionError("a state that JSON cannot hold was saved")
    dist.barrier()  # rank 0 has tidied up
    assert not (writer.directory / f"step_{step:06d}.tmp").exists() and not writer.failed
    found = latest_checkpoint(writer.directory)
    assert found is not None and found.name == f"step_{step - 1:06d}"
    writer.wait()


if __name__ == "__main__":
    main()
