"""Importance weights inside the loss: one rank against transformers and autograd in float64, layouts and micro-batches against one rank."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import make_checkpoint, make_views

sys.path.insert(0, str(Path(__file__).parent))
from correction_ranks import CASES, case_batch

SCRIPT = Path(__file__).with_name("correction_ranks.py")
GRADIENT, FIGURE = 1e-4, 2e-5
WEIGHED = [name for name in CASES if name not in ("off", "auto")]
Results = dict[str, tuple[dict[str, float | None], dict[str, torch.Tensor]]]


def log_probs(model: Any) -> torch.Tensor:
    found = []
    for view in make_views():
        logits = model(torch.tensor([[*view.prompt_ids, *view.response_ids]])).logits[0, len(view.prompt_ids) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(view.response_ids)[:, None])[:, 0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, with the log-probs of its views beside it: every layout gets the same engine."""
    path = make_checkpoint(tmp_path_factory.mktemp("correction") / "dense", moe=False)
    with torch.no_grad():
        torch.save(log_probs(double(path)).float(), path / "log_prob.pt")
    return path


def double(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path) -> Results:
    output = checkpoint / "one.pt"
    run_ranks(SCRIPT, 1, str(checkpoint), str(output))
    return torch.load(output)


@pytest.mark.parametrize("name", list(CASES))
def test_gradient_as_transformers_in_float64(checkpoint: Path, one_rank: Results, name: str) -> None:
    model = double(checkpoint)
    batch = case_batch(name, torch.load(checkpoint / "log_prob.pt"))
    log_prob = log_probs(model)
    sampling = log_prob.detach() if batch.old_log_prob is None else batch.old_log_prob.double()
    ratio = (sampling - batch.engine_log_prob.double()).split(batch.lengths)
    weights: list[float] = []
    for part in ratio:
        if CASES[name] and name.endswith("sequence"):
            weights += [math.exp(float(part.sum()))] * len(part)
        else:
            weights += part.exp().tolist()
    if name in ("off", "auto"):
        weights = [1.0] * len(weights)
    elif name.startswith("truncate"):
        weights = [min(w, 2.0) for w in weights]
    else:
        weights = [w if 0.5 <= w <= 2.0 else 0.0 for w in weights]
    u = batch.teacher_log_prob.double() - sampling
    phi = 0.5 * (torch.log1p(u.exp()) - math.log(2.0))
    a = batch.sequence_advantage.double().repeat_interleave(torch.tensor(batch.lengths)) - torch.where(batch.teacher_mask, 0.5 * phi, 0.0)
    kept = batch.sequence_mask.repeat_interleave(torch.tensor(batch.lengths))
    r = (log_prob - sampling).exp()
    surrogate = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
    loss = -(torch.tensor(weights, dtype=torch.float64) * surrogate)[kept].sum() / batch.tokens
    loss.backward()
    figures, gradients = one_rank[name]
    assert figures["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for key, gradient in gradients.items():
        reference = model.get_parameter(key).grad
        assert (gradient - reference).norm() < GRADIENT * reference.norm().clamp(min=1e-8), key
    inside = torch.tensor(weights)[kept]
    if name in WEIGHED:
        touched = inside == (2.0 if name.startswith("truncate") else 0.0)
        expected = {"mean": inside.mean(), "max": inside.max(), "min": inside.min()}
        for key, value in expected.items():
            assert figures[f"correction_weight_{key}"] == pytest.approx(value.item(), abs=FIGURE)
        assert figures["correction_touched_share"] == pytest.approx(float(touched.float().mean()), abs=1e-6)
        assert 0.02 < figures["correction_touched_share"] < 0.9, "some are touched, not all"
    else:
        assert figures["correction_weight_mean"] is None and figures["correction_touched_share"] is None


def test_auto_is_off_in_float32_to_the_last_bit(one_rank: Results) -> None:
    assert one_rank["auto"][0] == one_rank["off"][0]
    for key, gradient in one_rank["auto"][1].items():
        assert torch.equal(gradient, one_rank["off"][1][key]), key


@pytest.mark.parametrize(("ranks", "overrides"), [
    (1, ["trainer.micro_batch_tokens=4096"]),
    pytest.param(2, ["parallel.tensor_parallel_size=2"], marks=pytest.mark.slow),
    pytest.param(2, [], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.pipeline_parallel_size=2"], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.context_parallel_size=2"], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_size=2"], marks=pytest.mark.slow),
], ids=lambda value: str(value))
def test_neither_micro_batches_nor_ranks_enter(checkpoint: Path, one_rank: Results, tmp_path: Path, ranks: int, overrides: list[str]) -> None:
    run_ranks(SCRIPT, ranks, str(checkpoint), str(tmp_path / "result.pt"), *overrides)
    for name, (figures, gradients) in torch.load(tmp_path / "result.pt").items():
        expected, reference = one_rank[name]
        assert figures.keys() == expected.keys()
        for key, value in figures.items():
            assert value == expected[key] is None or value == pytest.approx(expected[key], rel=1e-4, abs=FIGURE), (name, key)
        for key, gradient in gradients.items():
            assert (gradient - reference[key]).norm() <= GRADIENT * reference[key].norm().clamp(min=1e-6), (name, key)
