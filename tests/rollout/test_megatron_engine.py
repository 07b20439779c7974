"""The in-process engine on real ranks, against transformers, the trainer's own scores and a single rank.

fp32 on gloo. Log-prob tolerances are about thirty times what was measured (3e-6).
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import VOCAB, make_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from megatron_engine_ranks import FREE, NEW, NUCLEUS, PROMPT, SEEDS, STOPS, make_requests

from megatron_antisd.rollout.engine import Generation

SCRIPT = Path(__file__).with_name("megatron_engine_ranks.py")
CLOSE = 1e-4
OTHER_WEIGHTS = 0.5
"""Mean difference in nats where the weights are others: measured 2.6."""

# name -> ranks, checkpoints, parallel settings. The dense model's embedding is tied, the vocabulary of 61 is padded under TP.
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "one": (1, ("moe", "dense"), ()),
    "tp2-ep2": (2, ("moe",), ("tensor_parallel_size=2", "expert_parallel_size=2")),
    "pp2": (2, ("moe", "dense"), ("pipeline_parallel_size=2",)),
    "dp2-ep2": (2, ("moe",), ("expert_parallel_size=2",)),
    "dp2-tp2-dense": (4, ("dense",), ("tensor_parallel_size=2",)),
    "tp2-pp2": (4, ("moe",), ("tensor_parallel_size=2", "pipeline_parallel_size=2")),
    "cp2": (2, ("moe",), ("context_parallel_size=2",)),
    "pp2-vpp2": (2, ("moe", "dense"), ("pipeline_parallel_size=2", "virtual_pipeline_size=2")),
    "pp2-vpp2-cp2": (4, ("dense",), ("pipeline_parallel_size=2", "virtual_pipeline_size=2", "context_parallel_size=2")),
}
SLOW = {"dp2-ep2", "dp2-tp2-dense", "tp2-pp2", "pp2-vpp2", "pp2-vpp2-cp2"}
CASES = [pytest.param(layout, kind, marks=[pytest.mark.slow] if layout in SLOW else []) for layout, (_, kinds, _) in LAYOUTS.items()
         for kind in kinds]


class Runs:
    """Runs a layout once, when a test first asks for it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.checkpoints = {kind: make_checkpoint(root / kind, moe=kind == "moe", tied=kind == "dense") for kind in ("moe", "dense")}
        self._found: dict[str, dict[str, dict[str, Any]]] = {}

    def facts(self, layout: str, kind: str) -> dict[str, Any]:
        if layout not in self._found:
            ranks, kinds, settings = LAYOUTS[layout]
            output = self._root / f"{layout}.pt"
            run_ranks(SCRIPT, ranks, str(output), ",".join(str(self.checkpoints[k]) for k in kinds), *settings, timeout=400)
            self._found[layout] = dict(zip(kinds, torch.load(output, weights_only=False), strict=True))
        return self._found[layout][kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("megatron_engine"))


def ids_of(generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [g.response_ids for g in generations]


def log_probs_of(generations: Sequence[Generation]) -> torch.Tensor:
    return torch.tensor([p for g in generations for p in g.log_probs], dtype=torch.float64)


def transformers_model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def nucleus_log_probs(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """[V] logits -> [V] log-probs after temperature and nucleus, written as its definition reads; -inf outside."""
    probability = (logits.double() / temperature).softmax(-1)
    kept: list[int] = []
    for token in probability.argsort(descending=True).tolist():
        kept.append(token)
        if float(probability[kept].sum()) >= top_p:
            break
    result = torch.full_like(probability, -math.inf)
    result[kept] = (probability[kept] / probability[kept].sum()).log()
    return result


@pytest.mark.parametrize("kind", ["moe", "dense"])
@torch.no_grad()
def test_greedy_as_transformers_generates(runs: Runs, kind: str) -> None:
    """A nucleus of one token, and a temperature near 0."""
    facts, model = runs.facts("one", kind), transformers_model(runs.checkpoints[kind])
    model.generation_config.eos_token_id = None
    expected = []
    for request in make_requests():
        prompt = torch.tensor([request.prompt_ids])
        # The mask is given: transformers would else take the id 0 inside a prompt for padding.
        row = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW, pad_token_id=0)[0]
        expected.append(tuple(row[prompt.shape[1]:].tolist()))
    assert ids_of(facts["greedy"]) == expected
    assert ids_of(facts["cold"]) == expected
    assert log_probs_of(facts["greedy"]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["moe", "dense"])
@torch.no_grad()
def test_log_probs_are_those_of_the_nucleus(runs: Runs, kind: str) -> None:
    facts, model = runs.facts("one", kind), transformers_model(runs.checkpoints[kind])
    for request, generation in zip(make_requests(), facts["nucleus"], strict=True):
        row = [*request.prompt_ids, *generation.response_ids]
        logits = model(torch.tensor([row])).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = [float(nucleus_log_probs(x, NUCLEUS.temperature, NUCLEUS.top_p)[token])
                    for x, token in zip(logits, generation.response_ids, strict=True)]
        assert generation.log_probs == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_log_probs_are_the_trainers(runs: Runs, layout: str, kind: str) -> None:
    """Decoded token by token with a cache, scored in one packed row; before and after an update of the weights."""
    facts = runs.facts(layout, kind)
    assert (log_probs_of(facts["free"]) - facts["free_score"]).abs().max() < CLOSE
    assert (log_probs_of(facts["updated"]) - facts["updated_score"]).abs().max() < CLOSE
    assert (log_probs_of(facts["free"]) - facts["old_under_new"]).abs().mean() > OTHER_WEIGHTS
    assert facts["versions"] == [0, 1]


@pytest.mark.parametrize(("layout", "kind"), CASES[2:])
def test_the_layout_does_not_enter_the_draw(runs: Runs, layout: str, kind: str) -> None:
    facts, reference = runs.facts(layout, kind), runs.facts("one", kind)
    for name in ("free", "fixed", "greedy", "cold", "nucleus"):
        assert ids_of(facts[name]) == ids_of(reference[name]), name
        if name != "cold":  # a temperature of 1e-3 makes 1000 times more of rounding
            assert (log_probs_of(facts[name]) - log_probs_of(reference[name])).abs().max() < CLOSE, name
        assert [g.truncated for g in facts[name]] == [g.truncated for g in reference[name]], name


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_draw_depends_on_its_request_alone(runs: Runs, layout: str, kind: str) -> None:
    """Not on its place, its neighbours, the number of slots, or the other replicas: with one request all but one are idle."""
    facts = runs.facts(layout, kind)
    assert ids_of(facts["wide"]) == ids_of(facts["free"])
    assert ids_of(facts["alone"]) == ids_of(facts["free"][2:3])
    assert facts["none"] == []
    assert facts["each_is_reported_once"] and facts["reported_while_decoding"]
    assert facts["free"][3].response_ids != facts["free"][4].response_ids, "one prompt, two seeds"


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_quota_gives_up_whole_groups_and_changes_no_draw(runs: Runs, layout: str, kind: str) -> None:
    found = runs.facts(layout, kind)["quota"]
    assert all(found.values()), found


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_responses_end_where_they_should(runs: Runs, layout: str, kind: str) -> None:
    facts = runs.facts(layout, kind)
    for generation in facts["free"]:
        *inner, last = generation.response_ids
        assert not set(inner) & set(STOPS)
        assert generation.truncated == (last not in STOPS)
        assert len(generation.response_ids) == NEW or last in FREE.stop_token_ids
    assert len({g.truncated for g in facts["free"]}) == 2, "both endings occur"
    assert all(len(g.response_ids) == NEW and g.truncated for g in facts["fixed"])
    for free, fixed in zip(facts["free"], facts["fixed"], strict=True):
        assert fixed.response_ids[: len(free.response_ids)] == free.response_ids


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_what_cannot_run_is_refused_on_every_rank(runs: Runs, layout: str, kind: str) -> None:
    facts = runs.facts(layout, kind)
    assert "a prompt of 53 tokens + max_new_tokens 12 = 65 exceeds the context of 64" in facts["too_long"]
    assert f"a token id outside 0..{VOCAB - 1}" in facts["foreign"]
    assert facts["beyond_model"].startswith("rollout.max_context=513 exceeds the model's max_position_embeddings of 512")
    assert layout == "one" or "passed other requests or sampling than rank 0" in facts["disagreement"]
    assert "logits that are not finite" in facts["broken"]
    assert facts["closed"] == "generate: the engine is closed"


@pytest.mark.parametrize(("name", "top_p"), [("plain", 1.0), ("nucleus", 0.7)])
@torch.no_grad()
def test_first_tokens_follow_the_softmax(runs: Runs, name: str, top_p: float) -> None:
    """Chi-square of 4000 draws with seeds 0 .. 3999 against transformers; tokens expected fewer than 5 times share a bin."""
    drawn = Counter(runs.facts("one", "moe")["one_token"][name])
    logits = transformers_model(runs.checkpoints["moe"])(torch.tensor([PROMPT])).logits[0, -1]
    expected = nucleus_log_probs(logits, 1.5, top_p).exp() * SEEDS
    assert all(expected[token] > 0 for token in drawn)
    large = [token for token in range(VOCAB) if expected[token] >= 5]
    pairs = [(drawn[token], float(expected[token])) for token in large]
    rest = SEEDS - sum(e for _, e in pairs)
    if rest > 5:
        pairs.append((SEEDS - sum(n for n, _ in pairs), rest))
    statistic = sum((n - e) ** 2 / e for n, e in pairs)
    freedom = len(pairs) - 1
    assert freedom >= 5
    # Wilson and Hilferty's approximation of the 99.9 % quantile (z = 3.09).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3, f"{statistic} with {freedom} degrees"


def test_draw_at_the_edges() -> None:
    from megatron_antisd.rollout.megatron_engine import draw

    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 3)
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    ids, log_probs = draw(logits, uniform, temperature=1.0, top_p=1.0)
    assert ids.tolist() == [1, 2, 2], "a token without probability is never drawn"
    assert log_probs.tolist() == pytest.approx([-math.log(2)] * 3, abs=1e-12)
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 2
    uniform = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    ids, log_probs = draw(logits, uniform, temperature=0.9, top_p=0.6)
    assert torch.equal(logits, before)
    for row in range(200):
        table = nucleus_log_probs(logits[row], 0.9, 0.6)
        place = int((table.exp().cumsum(0) <= uniform[row]).sum())
        assert int(ids[row]) == place
        assert float(log_probs[row]) == pytest.approx(float(table[place]), abs=1e-9)
