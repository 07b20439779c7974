"""The quickstart's task: its problems have one answer, its demonstrations are what they claim, its tokenizer loses nothing."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from examples.quickstart import task
from examples.quickstart.make_base import STAGES, learning_rate, supervised_batch, view_of
from examples.quickstart.tokenizer import END, build_tokenizer
from megatron_antisd.grading.math import grade


def test_problems_have_one_answer_and_splits_are_disjoint() -> None:
    rng = random.Random(0)
    problems = [task.sample_problem(rng) for _ in range(500)]
    for problem in problems:
        assert sum(problem.value(c) == problem.c for c in problem.candidates) == 1
        assert task.parse_problem(problem.text) == problem
    train = {task.sample_problem(rng, "train").text for _ in range(500)}
    held_out = {task.sample_problem(rng, "eval").text for _ in range(500)}
    assert not train & held_out


def test_the_reference_solution_is_graded_right_and_another_answer_wrong() -> None:
    rng = random.Random(1)
    for _ in range(50):
        problem = task.sample_problem(rng)
        solution = task.reference_solution(problem, rng)
        assert task.is_correct(problem, solution) and grade(solution, str(problem.root)) == 1.0
        wrong = next(c for c in problem.candidates if c != problem.root)
        assert grade(" ".join(task.answer(wrong, rng)), str(problem.root)) == 0.0


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_demonstrations_are_words_of_the_task_and_their_arithmetic_holds(stage: object) -> None:
    tokenizer = build_tokenizer(task.words())
    for user, response in itertools.islice(task.demonstrations(stage.mix, seed=3), 300):
        assert tokenizer.unk_token_id not in tokenizer.encode(user + " " + response)
        assert tokenizer.decode(tokenizer.encode(response)) == response
        assert len(response.split()) <= task.MAX_DEMO_WORDS + 8
    faultless = task.CorpusMix(slip=0.0, false_match=0.0, shortcut=0.0, privileged=0.0)
    for user, response in itertools.islice(task.demonstrations(faultless, seed=4), 200):
        problem, words = task.parse_problem(user), response.split()
        for place, word in enumerate(words):
            if word in task.TRY:
                candidate, product, total, rest = map(int, words[place + 1 : place + 5])
                assert product == problem.a * candidate % task.MODULUS
                assert total == problem.value(candidate) and rest == (total - problem.c) % task.MODULUS
                assert (rest == 0) == (words[place + 5] in task.OK)


def test_kinds_name_every_token() -> None:
    problem = task.parse_problem("solve 3 5 9 2 7 0 1 a4 b7 c2")
    response = f"try 3 1 8 6 wait let 7 6 2 0 holds so \\boxed{{7}} {END}"
    assert task.kinds(problem.text, response) == [
        "TRY:first", "candidate", "calc", "calc", "calc", "WAIT", "TRY", "candidate", "calc", "calc", "calc", "OK", "ANS:afterOK",
        "answer:right", "eos"]
    assert task.kinds(problem.text, "so \\boxed{3}") == ["ANS:first", "answer:wrong"]


def test_files_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        task.write_problems(tmp_path / name, 50, seed=7, split="train")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert len({row["problem"] for row in rows}) == 50
    assert all(grade(row["solution"], row["answer"]) == 1.0 for row in rows)


def test_supervised_batches_end_with_the_end_token() -> None:
    tokenizer = build_tokenizer(task.words())
    view = view_of(("solve 3 5 9 2 7 0 1 a4 b7 c2", "so \\boxed{7}"), tokenizer)
    assert tokenizer.decode(list(view.prompt_ids)) == "<user> solve 3 5 9 2 7 0 1 a4 b7 c2 <assistant>"
    assert view.response_ids[-1] == tokenizer.eos_token_id and len(view.response_ids) == 3
    batch = supervised_batch([view, view])
    assert batch.tokens == 6 and batch.lambda_ == 0.0 and not batch.teacher_mask.any()
    assert learning_rate(0, 100) < learning_rate(29, 100) and learning_rate(99, 100) > 0
