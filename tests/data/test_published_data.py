"""The same code on published data and Qwen3's own tokenizer; needs ANTISD_DATA."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_antisd.config import DataConfig, PrivilegedConfig
from megatron_antisd.data import ProblemDataError, ProblemSampler, PromptBuilder, load_problems
from megatron_antisd.records import Problem, Rollout, RolloutGroup

TEMPLATES = {"qwen3-8b/30b-a3b": "qwen3_chat_template.jinja", "qwen3-4b-instruct-2507": "qwen3-4b-instruct-2507_chat_template.jinja"}


@pytest.fixture(scope="module")
def qwen3(real_data: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(real_data / "tokenizer" / "qwen3")


def with_template(tokenizer: PreTrainedTokenizerBase, real_data: Path, model: str) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = (real_data / "tokenizer" / TEMPLATES[model]).read_text(encoding="utf-8")
    return tokenizer


def builder(tokenizer: PreTrainedTokenizerBase, max_context: int = 32768, **data: object) -> PromptBuilder:
    return PromptBuilder(tokenizer, DataConfig(train=("x.jsonl",), **data), PrivilegedConfig(), max_context)


def test_dapo_counts(real_data: Path) -> None:
    """Parquet: 17,917 rows, 650 copies, 12 texts (24 rows) with contradicting answers."""
    parquet = load_problems([real_data / "raw" / "dapo_math_17k.parquet"])
    assert len(parquet) == 17917 - 650 - 24 and all(p.solution is None for p in parquet)
    lines = load_problems([real_data / "train" / "dapo_math_17k.jsonl"])
    assert len(lines) == 16267 and sum(p.solution is not None for p in lines) == 3046
    assert (parquet[0].prompt, parquet[0].answer) == (lines[0].prompt, lines[0].answer) and lines[0].answer == "34"
    sampler = ProblemSampler(lines, 32, seed=0)
    assert len({p.id for _ in range(200) for p in sampler.next()}) == 6400


def test_every_plain_file_loads(real_data: Path) -> None:
    """All but one: MATH's training set as collected here has a problem without an answer, which is named."""
    for path in sorted([*real_data.glob("train/*.jsonl"), *real_data.glob("eval/*.jsonl")]):
        if path.name == "math_train.jsonl":
            with pytest.raises(ProblemDataError, match="line 4362: `answer` is empty"):
                load_problems([path])
            continue
        assert len(load_problems([path])) == len(path.read_text(encoding="utf-8").rstrip("\n").split("\n"))


def test_chat_goldens(real_data: Path, qwen3: PreTrainedTokenizerBase) -> None:
    """Every golden that is a student prompt ([system,] user, generation prompt), through the builder; the others through the tokenizer."""
    checked = 0
    for line in (real_data / "goldens" / "qwen3_chat_golden.dev.jsonl").read_text(encoding="utf-8").splitlines():
        golden = json.loads(line)
        tokenizer = with_template(qwen3, real_data, golden["model"])
        arguments = {} if golden["enable_thinking"] is None else {"enable_thinking": golden["enable_thinking"]}
        messages, system = golden["messages"], None
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=golden["add_generation_prompt"], tokenize=False, **arguments)
        assert text == golden["text"] and tokenizer(text)["input_ids"] == golden["ids"], golden["id"]
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        if golden["add_generation_prompt"] and [m["role"] for m in messages] == ["user"]:
            prompts = builder(tokenizer, system_prompt=system, chat_template_kwargs=arguments)
            assert list(prompts.student_prompt(Problem(id="p", prompt=messages[0]["content"], answer="1"))) == golden["ids"], golden["id"]
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("thinking", [True, False])
def test_privileged_prompts_of_real_problems(real_data: Path, qwen3: PreTrainedTokenizerBase, thinking: bool) -> None:
    """Real solutions under tight random contexts: question, feedback and generation prompt whole, the solution's end kept."""
    tokenizer = with_template(qwen3, real_data, "qwen3-8b/30b-a3b")
    problems = [p for p in load_problems([real_data / "train" / "aime_1983_2023.jsonl"]) if p.solution]
    rng, sources = random.Random(0), set()
    for step, problem in enumerate(rng.sample(problems, 60)):
        sample = make_group(tokenizer, problem, [problem.solution or "", "I do not know."])
        prompts = builder(tokenizer, rng.randint(100, 900), chat_template_kwargs={"enable_thinking": thinking})
        view = prompts.privileged_views(sample, seed=0, step=step)[1]
        sources.add(view.source)
        if view.view is None:
            continue
        text = tokenizer.decode(view.view.prompt_ids)
        head = f"<|im_start|>user\n{problem.prompt}\n\nYour previous attempt:\n"
        foot = ("\n\nPrevious assessment: Your answer is incorrect.\n\nNow solve this problem step by step.<|im_end|>\n<|im_start|>assistant\n"
                + ("" if thinking else "<think>\n\n</think>\n\n"))
        assert text.startswith(head) and text.endswith(foot)
        assert (problem.solution or "").endswith(text[len(head):-len(foot)]) and len(text) > len(head) + len(foot)
    assert sources == {"peer", "no_room"}


def make_group(tokenizer: PreTrainedTokenizerBase, problem: Problem, texts: list[str]) -> RolloutGroup:
    """The first text is correct."""
    rollouts = []
    for index, text in enumerate(texts):
        ids = tuple(tokenizer(text)["input_ids"])
        rollouts.append(Rollout(problem_id=problem.id, index=index, prompt_ids=(1,), response_ids=ids, engine_log_probs=(0.0,) * len(ids),
                                truncated=False, policy_version=0, text=text).graded(
                                    float(index == 0), "Your answer is correct." if index == 0 else "Your answer is incorrect."))
    return RolloutGroup(problem=problem, rollouts=tuple(rollouts))


def test_a_batch_of_256_long_rollouts_is_quick(real_data: Path, qwen3: PreTrainedTokenizerBase) -> None:
    """32 groups of 8 with solutions of about 8,000 tokens: about 1.5 s of CPU time (bound: 20 s, for slow machines)."""
    tokenizer = with_template(qwen3, real_data, "qwen3-8b/30b-a3b")
    problems = load_problems([real_data / "train" / "aime_1983_2023.jsonl"])[:96]
    long = "\n\n".join(p.solution or "" for p in problems)[:24000]
    groups = [make_group(tokenizer, problem, [long, *[f"wrong {i}" for i in range(7)]]) for problem in problems[:32]]
    prompts = builder(tokenizer)
    start = time.process_time()
    views = [view for sample in groups for view in prompts.privileged_views(sample, seed=0, step=0)]
    seconds = time.process_time() - start
    assert len(views) == 256 and max(len(v.view.prompt_ids) for v in views if v.view) > 7000
    assert seconds < 20, f"{seconds:.1f} s"
    print(f"256 privileged views: {seconds:.2f} s")
