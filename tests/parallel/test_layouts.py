"""Every layout against one rank, and one rank against transformers: scores, losses, gradients, updated weights, from one checkpoint.

fp32 on gloo. Tolerances are about ten times what was measured: rounding differs with the order of sums.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from safetensors.torch import load_file
from tiny import gradient_on_disk, make_checkpoint, make_olmo3, make_views

SCRIPT = Path(__file__).with_name("layout_ranks.py")
SCORE, LOSS, GRADIENT = 2e-5, 2e-5, 1e-4
# Adam divides by a gradient's own size, so an element whose gradient is all rounding may move by a part of lr = 1e-3: of the largest little is asked.
WEIGHT, WEIGHT_MEAN = 5e-4, 3e-7
STEPS = 3


def selective(*modules: str) -> list[str]:
    """Overrides that compute these parts of a layer anew in the backward pass."""
    return ["model.recompute=selective", f"model.recompute_modules=[{','.join(modules)}]"]


LAYOUTS = {
    "dp2": (2, [], "moe"),
    "dp2-plain-optimizer": (2, ["parallel.distributed_optimizer=false"], "moe"),
    "tp2": (2, ["parallel.tensor_parallel_size=2", "parallel.distributed_optimizer=false"], "moe"),
    "etp2": (2, ["parallel.expert_tensor_parallel_size=2"], "moe"),
    "tp2-etp2": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_tensor_parallel_size=2"], "moe"),
    "ep2": (2, ["parallel.expert_parallel_size=2"], "moe"),
    "tp2-ep2": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2"], "moe"),
    "pp2": (2, ["parallel.pipeline_parallel_size=2", "parallel.distributed_optimizer=false"], "moe"),
    "pp2-recompute": (2, ["parallel.pipeline_parallel_size=2", "model.recompute=full"], "moe"),
    "tp2-pp2": (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], "moe"),
    "pp2-ep2": (4, ["parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=2"], "moe"),
    "tp2-ep2-etp2": (4, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", "parallel.expert_tensor_parallel_size=2"], "moe"),
    "pp2-uneven": (2, ["parallel.pipeline_parallel_size=2", "parallel.pipeline_layers=[3,1]"], "moe"),
    "pp2-vpp2": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"], "moe"),
    "pp2-vpp2-recompute-olmo3": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "model.recompute=full"], "olmo3"),
    "tp2-pp2-vpp2": (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"], "moe"),
    "pp3-dense-tied": (3, ["parallel.pipeline_parallel_size=3", "parallel.pipeline_layers=[1,2,1]"], "dense"),
    "pp2-vpp2-dense-tied": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"], "dense"),
    "pp3-vpp2": (3, ["parallel.pipeline_parallel_size=3", "parallel.virtual_pipeline_size=2"], "deep"),
    "pp2-cp2-dense-tied": (4, ["parallel.pipeline_parallel_size=2", "parallel.context_parallel_size=2"], "dense"),
    "cp2": (2, ["parallel.context_parallel_size=2"], "moe"),
    "cp2-dense": (2, ["parallel.context_parallel_size=2", "parallel.distributed_optimizer=false"], "dense"),
    "cp2-olmo3": (2, ["parallel.context_parallel_size=2"], "olmo3"),
    "cp2-ep2": (2, ["parallel.context_parallel_size=2", "parallel.expert_parallel_size=2"], "moe"),
    "tp2-cp2": (4, ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2"], "moe"),
    "tp2-cp2-ep4": (4, ["parallel.tensor_parallel_size=2", "parallel.context_parallel_size=2", "parallel.expert_parallel_size=4"], "moe"),
    "cp2-dp2": (4, ["parallel.context_parallel_size=2"], "moe"),
    "cp4-olmo3": (4, ["parallel.context_parallel_size=4"], "olmo3"),
    "pp2-cp2": (4, ["parallel.pipeline_parallel_size=2", "parallel.context_parallel_size=2", "model.recompute=full"], "moe"),
    "pp2-vpp2-cp2-ep2": (4, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.context_parallel_size=2",
                             "parallel.expert_parallel_size=2"], "moe"),
    "tp2-dense": (2, ["parallel.tensor_parallel_size=2"], "dense"),
    "pp2-dense-tied": (2, ["parallel.pipeline_parallel_size=2"], "dense"),
    "tp2-olmo3": (2, ["parallel.tensor_parallel_size=2"], "olmo3"),
    "tp2-pp2-olmo3": (4, ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], "olmo3"),
    "pp2-recompute-olmo3": (2, ["parallel.pipeline_parallel_size=2", "model.recompute=full"], "olmo3"),
    "grouped": (1, ["model.grouped_experts=grouped"], "moe"),
    "tp2-ep2-grouped": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", "model.grouped_experts=grouped"], "moe"),
    "tp2-ep2-selective": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", *selective("attention", "mlp", "norms")], "moe"),
    "selective-attention": (1, selective("attention"), "moe"),
    "selective-mlp": (1, selective("mlp"), "moe"),
    "selective-norms": (1, selective("norms"), "moe"),
    "pp2-selective-grouped": (2, ["parallel.pipeline_parallel_size=2", "model.grouped_experts=grouped",
                                  *selective("attention", "mlp", "norms")], "moe"),
    "pp2-vpp2-selective": (2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2",
                               *selective("attention", "mlp", "norms")], "moe"),
    "cp2-selective-dense": (2, ["parallel.context_parallel_size=2", *selective("attention", "mlp", "norms")], "dense"),
    "tp2-selective-olmo3": (2, ["parallel.tensor_parallel_size=2", *selective("attention", "mlp")], "olmo3"),
    "dp2-offload": (2, ["optimizer.offload=true"], "moe"),
    "tp2-offload-plain-optimizer": (2, ["parallel.tensor_parallel_size=2", "optimizer.offload=true", "parallel.distributed_optimizer=false"], "moe"),
    "dp2-overlap": (2, ["parallel.overlap_gradients=true", "parallel.gradient_bucket_parameters=20000"], "moe"),
    "dp2-overlap-plain-optimizer": (2, ["parallel.overlap_gradients=true", "parallel.gradient_bucket_parameters=20000",
                                        "parallel.distributed_optimizer=false", "model.recompute=full"], "moe"),
    "dp2-overlap-dense-tied": (2, ["parallel.overlap_gradients=true", "parallel.gradient_bucket_parameters=20000"], "dense"),
    "tp2-ep2-overlap": (2, ["parallel.tensor_parallel_size=2", "parallel.expert_parallel_size=2", "parallel.overlap_gradients=true"], "moe"),
    "pp2-dp2-overlap-selective": (4, ["parallel.pipeline_parallel_size=2", "parallel.overlap_gradients=true",
                                      "parallel.gradient_bucket_parameters=20000", *selective("attention", "mlp", "norms")], "moe"),
    "pp2-vpp2-dp2-overlap": (4, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2", "parallel.overlap_gradients=true",
                                 "parallel.gradient_bucket_parameters=20000"], "moe"),
}
FAST = {"dp2", "tp2", "ep2", "tp2-ep2", "pp2", "tp2-pp2", "pp2-ep2", "pp2-vpp2", "pp2-vpp2-cp2-ep2", "cp2-olmo3", "tp2-cp2-ep4",
        "pp2-dense-tied", "tp2-olmo3", "tp2-ep2-grouped", "tp2-ep2-selective", "dp2-overlap", "pp2-dp2-overlap-selective"}


def make(kind: str, directory: Path) -> Path:
    if kind == "olmo3":
        return make_olmo3(directory)
    return make_checkpoint(directory, moe=kind != "dense", tied=kind == "dense", **({"num_hidden_layers": 6} if kind == "deep" else {}))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """kind -> (checkpoint, what one rank got)."""
    root = tmp_path_factory.mktemp("layouts")
    found = {}
    for kind in ("moe", "dense", "olmo3", "deep"):
        checkpoint = make(kind, root / kind)
        output = root / f"{kind}.pt"
        run_ranks(SCRIPT, 1, str(checkpoint), str(output), str(STEPS), "parallel.distributed_optimizer=false")
        found[kind] = (checkpoint, torch.load(output))
    return found


def huggingface(checkpoint: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def huggingface_scores(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs, entropies = [], []
    for view in make_views():
        logits = model(torch.tensor([[*view.prompt_ids, *view.response_ids]])).logits[0, len(view.prompt_ids) - 1 : -1].double()
        table = logits.log_softmax(-1)
        log_probs.append(table.gather(1, torch.tensor(view.response_ids)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


@pytest.mark.parametrize("kind", ["moe", "dense", "olmo3"])
def test_one_rank_scores_as_transformers(references: dict, kind: str) -> None:
    checkpoint, result = references[kind]
    with torch.no_grad():
        log_prob, entropy = huggingface_scores(huggingface(checkpoint))
    assert (result["score"][0] - log_prob).abs().max() < SCORE
    assert (result["score"][1] - entropy).abs().max() < SCORE


@pytest.mark.parametrize("kind", ["moe", "dense", "olmo3"])
def test_one_rank_gradients_as_transformers(references: dict, kind: str) -> None:
    """The whole AntiSD loss through transformers and autograd, written out by hand."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from layout_ranks import make_batch

    checkpoint, result = references[kind]
    model = huggingface(checkpoint)
    views = make_views()
    batch = make_batch(views, 0)
    log_prob, _ = huggingface_scores(model)
    u = batch.teacher_log_prob - log_prob.detach()
    phi = 0.5 * (torch.log1p(u.exp()) - torch.log(torch.tensor(2.0)))
    lengths = torch.tensor(batch.lengths)
    advantage = batch.sequence_advantage.repeat_interleave(lengths) - torch.where(batch.teacher_mask, 0.5 * phi, torch.zeros(()))
    kept = batch.sequence_mask.repeat_interleave(lengths)
    loss = -(advantage * log_prob)[kept].sum() / kept.sum()
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    compared = 0
    for name, gradient in result["gradients"].items():
        reference = gradient_on_disk(expected, name)
        error = (gradient - reference).norm() / reference.norm().clamp(min=1e-8)
        assert error < GRADIENT, f"{name}: relative error {error:.1e}"
        compared += 1
    assert compared == len(result["loaded"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in LAYOUTS])
def test_layout_equals_one_rank(references: dict, tmp_path: Path, name: str) -> None:
    ranks, overrides, kind = LAYOUTS[name]
    checkpoint, reference = references[kind]
    output = tmp_path / "result.pt"
    run_ranks(SCRIPT, ranks, str(checkpoint), str(output), str(STEPS), *overrides)
    result = torch.load(output)
    on_disk = load_file(checkpoint / "model.safetensors")
    assert result["loaded"].keys() == on_disk.keys() - ({"lm_head.weight"} if kind == "dense" else set())
    for key, tensor in result["loaded"].items():
        assert torch.equal(tensor, on_disk[key]), f"{key} is not what the checkpoint holds"
    for mine, theirs in zip(result["score"], reference["score"], strict=True):
        assert (mine - theirs).abs().max() < SCORE
    for mine, theirs in zip(result["steps"], reference["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=LOSS)
    assert result["gradients"].keys() == reference["gradients"].keys()
    for key, gradient in result["gradients"].items():
        theirs = reference["gradients"][key]
        assert (gradient - theirs).norm() <= GRADIENT * theirs.norm().clamp(min=1e-6), key
    for key, tensor in result["weights"].items():
        difference = (tensor - reference["weights"][key]).abs()
        assert difference.max() < WEIGHT and difference.mean() < WEIGHT_MEAN, f"{key}: {difference.max():.1e}, mean {difference.mean():.1e}"
    # The rows of this test are tiny: chunks for context-parallel ranks and rows that fill a schedule weigh more than in earnest.
    assert result["padding"] < (0.15 if "cp" in name or "vpp" in name else 0.02)


@pytest.mark.slow
def test_experts_go_astray_without_the_repair(references: dict, tmp_path: Path) -> None:
    """Megatron marks experts as such only where EP > 1. With TP2, EP1 and ETP1 their gradients then stay what each rank's own tokens give."""
    checkpoint, reference = references["moe"]
    output = tmp_path / "result.pt"
    run_ranks(SCRIPT, 2, str(checkpoint), str(output), "1", *LAYOUTS["tp2"][1], env={"WITHOUT_EXPERT_MARKS": "1"})
    result = torch.load(output)
    errors = {key: float((gradient - reference["gradients"][key]).norm() / reference["gradients"][key].norm())
              for key, gradient in result["gradients"].items()}
    assert min(error for key, error in errors.items() if ".experts." in key) > 0.1
    assert result["steps"][0][0] == pytest.approx(reference["steps"][0][0], rel=1e-4), "the loss tells nothing of it"


def test_loss_is_independent_of_micro_batches(references: dict, tmp_path: Path) -> None:
    """One large micro-batch gives the step that many small ones gave."""
    checkpoint, reference = references["moe"]
    output = tmp_path / "result.pt"
    run_ranks(SCRIPT, 1, str(checkpoint), str(output), "2", "trainer.micro_batch_tokens=4096", "parallel.distributed_optimizer=false")
    result = torch.load(output)
    for mine, theirs in zip(result["steps"], reference["steps"][:2], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=LOSS)
    for key, gradient in result["gradients"].items():
        theirs = reference["gradients"][key]
        assert (gradient - theirs).norm() <= GRADIENT * theirs.norm().clamp(min=1e-6), key


def test_reference_moves(references: dict) -> None:
    """The comparisons above mean something only if the steps change the weights by more than the tolerance."""
    for kind, (checkpoint, reference) in references.items():
        assert json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"] == (6 if kind == "deep" else 4)
        moved = [(t - reference["loaded"][n]).abs() for n, t in reference["weights"].items()]
        assert min(m.max() for m in moved) > 4 * WEIGHT and min(m.mean() for m in moved) > 500 * WEIGHT_MEAN
