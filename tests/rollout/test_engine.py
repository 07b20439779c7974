"""The engine protocol without an engine: what is refused, the seeds, and that importing it is light."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from megatron_antisd.records import Problem
from megatron_antisd.rollout.engine import EngineError, Finished, Generation, Quota, Request, Sampling, check_requests
from megatron_antisd.rollout.groups import generate_groups, rollout_seed

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=8, stop_token_ids=(2,))


class Echo:
    """Answers each request with its own seed's last digits: shows which request each rollout came from."""

    policy_version = 11

    def generate(self, requests: Sequence[Request], sampling: Sampling, finished: Finished | None = None,
                 quota: Quota | None = None) -> list[Generation | None]:
        return [Generation(response_ids=(r.seed % 1000,), log_probs=(-0.5,), truncated=False) for r in requests]


def groups_of(step: int, names: Sequence[str]) -> list[list[int]]:
    problems = [Problem(id=name, prompt="", answer="") for name in names]
    groups = generate_groups(Echo(), problems, [(1, 2)] * len(names), sampling=SAMPLING, group_size=3, seed=5, step=step,
                             decode=lambda ids: "x")  # type: ignore[arg-type]
    return [[r.response_ids[0] for r in group.rollouts] for group in groups]


def test_importing_the_room_imports_no_engine() -> None:
    code = ("import sys, megatron_antisd.rollout, megatron_antisd.rollout.vllm_engine, megatron_antisd.rollout.groups; "
            "assert 'vllm' not in sys.modules and 'megatron.core' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_seeds_do_not_depend_on_the_process() -> None:
    """Fixed values: a change would make a resumed run draw other rollouts."""
    assert rollout_seed(0, 0, "a", 0) == 6213714296089835783
    seeds = {rollout_seed(s, t, name, i) for s in range(3) for t in range(3) for name in ("a", "b", "a/0") for i in range(3)}
    assert len(seeds) == 81 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_rollout_depends_on_its_problem_not_on_its_place() -> None:
    first, swapped = groups_of(4, ["p", "q"]), groups_of(4, ["q", "p"])
    assert first == swapped[::-1]
    assert first != groups_of(5, ["p", "q"])
    expected = [rollout_seed(5, 4, "p", i) % 1000 for i in range(6)]
    assert groups_of(4, ["p", "q", "p"])[::2] == [expected[:3], expected[3:]]


def test_prompts_and_problems_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        generate_groups(Echo(), [Problem(id="p", prompt="", answer="")], [], sampling=SAMPLING, group_size=2, seed=0, step=0,
                        decode=lambda ids: "")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [((), "request 1 has an empty prompt"),
     ((1,) * 25, r"request 1: a prompt of 25 tokens \+ max_new_tokens 8 = 33 exceeds the context of 32; the longest prompt possible is 24"),
     ((1, 40), r"request 1 has a token id outside 0\.\.39: 1\.\.40"), ((-1, 3), r"outside 0\.\.39: -1\.\.3")],
)
def test_requests_that_cannot_run_are_named(prompt: tuple[int, ...], message: str) -> None:
    fine = Request(prompt_ids=(1,) * 24, seed=0)
    check_requests([fine], SAMPLING, max_context=32, vocab_size=40)
    with pytest.raises(EngineError, match=message):
        check_requests([fine, Request(prompt_ids=prompt, seed=0)], SAMPLING, max_context=32, vocab_size=40)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"stop_token_ids": ()}])
def test_sampling_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    arguments = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "stop_token_ids": (2,), **change}
    with pytest.raises(ValueError, match="expected temperature|no stop_token_ids"):
        Sampling(**arguments)  # type: ignore[arg-type]
