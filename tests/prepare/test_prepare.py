"""Published schemas -> our rows; what is dropped is counted; benchmarks are kept out of training data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_antisd.data import load_problems
from megatron_antisd.prepare.commands import main
from megatron_antisd.prepare.decontamination import Decontamination, words
from megatron_antisd.prepare.schemas import Dropped, read_row
from megatron_antisd.records import Problem

DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) where "
        "$Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after \"Answer:\".")


def verl(text: str, answer: Any, index: Any = "i-1") -> dict[str, Any]:
    return {"data_source": "math_dapo", "prompt": [{"role": "user", "content": DAPO.format(text)}], "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval"}, "extra_info": {"index": index}}


@pytest.mark.parametrize(("row", "expected"), [
    # HuggingFaceH4/aime_2024
    ({"id": 60, "problem": "P?", "solution": "S", "answer": "204", "url": "u", "year": "2024"}, ("n-60", "P?", "204", "S")),
    # MathArena/aime_2025, hmmt_feb_2025
    ({"problem_idx": 1, "problem": "P?", "answer": 70, "problem_type": ["Algebra"]}, ("n-1", "P?", "70", None)),
    # math-ai/minervamath
    ({"question": "Q?", "answer": "\\frac{1}{2}"}, ("n-00007", "Q?", "\\frac{1}{2}", None)),
    # HuggingFaceH4/MATH-500
    ({"problem": "P?", "solution": "S", "answer": "3", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
     ("n-test/algebra/1.json", "P?", "3", "S")),
    # MATH: the answer is the solution's last box
    ({"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": "First \\boxed{1}. So \\boxed{\\frac{2}{3}}."},
     ("n-00007", "P?", "\\frac{2}{3}", "First \\boxed{1}. So \\boxed{\\frac{2}{3}}.")),
    # openai/gsm8k
    ({"question": "Q?", "answer": "She has <<2*9=18>>18.\n#### 1,018"},
     ("n-00007", "Q?", "1018", "She has <<2*9=18>>18.\nThe answer is \\boxed{1018}.")),
    ({"question": "Q?", "answer": "18", "solution": "She has 18.\n#### 18"}, ("n-00007", "Q?", "18", "She has 18.\nThe answer is \\boxed{18}.")),
    # another spelling, and a boxed answer
    ({"ID": "2024-I-1", "Problem": "P?", "Answer": "$\\boxed{5}$", "Solution": "S"}, ("n-2024-I-1", "P?", "5", "S")),
    # verl
    (verl("P?", "34"), ("n-00007", "P?", "34", None)),
])
def test_published_schemas(row: dict[str, Any], expected: tuple[str, str, str, str | None]) -> None:
    problem = read_row(row, {}, "n", 7)
    assert (problem.id, problem.prompt, problem.answer, problem.solution) == expected


def test_columns_can_be_named() -> None:
    assert read_row({"statement": "P?", "result": "4"}, {"problem": "statement", "answer": "result"}, "n", 1).answer == "4"
    with pytest.raises(Dropped, match="no column 'gone'.*the row has"):
        read_row({"statement": "P?"}, {"problem": "gone"}, "n", 1)


@pytest.mark.parametrize(("row", "reason"), [
    ({"problem": "P?", "answer": None}, "no answer"), ({"problem": "P?", "answer": ""}, "no answer"), ({"problem": "P?"}, "no answer"),
    ({"problem": "P?", "solution": "no box"}, "no answer"), ({"text": "P?", "answer": "4"}, "no problem text"),
    ({"problem": "  ", "answer": "4"}, "a value of the wrong kind"), ({"problem": ["P?"], "answer": "4"}, "a value of the wrong kind"),
    ({"problem": "P?", "answer": ["4"]}, "a value of the wrong kind"), ({"problem": "P?", "answer": float("nan")}, "a value of the wrong kind"),
    (verl("P?", None), "no answer"),
])
def test_what_cannot_be_used_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Dropped) as dropped:
        read_row(row, {}, "n", 1)
    assert dropped.value.reason == reason


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_parquet_with_copies_contradictions_and_contamination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaked = "Let n be the number of ways to seat five guests at a round table such that no two of them are neighbours. Find n."
    rows = [verl(text, answer) for text, answer in (
        ("What is one plus one?", "2"), ("What is one plus one?", "2"), ("What is two plus two?", "4"), ("What is two plus  two?", "5"),
        ("No answer here?", ""), (leaked.upper().replace(",", ""), "12"), ("Clean and kept?", "7"))]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"id": "h-1", "problem": leaked, "answer": "12"}) + "\n")
    output = tmp_path / "out/dapo.jsonl"
    status, said, _ = run(capsys, "dapo", "--from", tmp_path / "train.parquet", "--output", output, "--decontaminate", tmp_path / "held-out.jsonl")
    assert status == 0 and "7 rows -> 2 problems" in said and "dropped 1: contaminated by held-out (such as dapo-00006 repeats h-1)" in said
    problems = load_problems([output])
    assert [(p.id, p.prompt, p.answer, p.source) for p in problems] == [
        ("dapo-00001", "What is one plus one?", "2", "math_dapo"), ("dapo-00007", "Clean and kept?", "7", "math_dapo")]
    manifest = json.loads((tmp_path / "out/dapo.jsonl.manifest.json").read_text())
    assert manifest["dropped"] == {"copy of an earlier row": 1, "same problem with different answers": 2, "no answer": 1,
                                   "contaminated by held-out": 1}
    assert manifest["rows"] == manifest["problems"] + sum(manifest["dropped"].values())
    assert run(capsys, output, "--verify")[0] == 0
    output.write_text(output.read_text().replace("Clean", "Dirty"))
    status, _, error = run(capsys, output, "--verify")
    assert status == 1 and "it was changed since" in error


def test_programming_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EvalPlus' release form: expected outputs come from the canonical solution, run in the sandbox."""
    row = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n    \"\"\" Sum. \"\"\"\n", "canonical_solution": "    return a + b\n",
           "entry_point": "add", "base_input": [[1, 2], [0, 0]], "plus_input": [[[1], [2]]], "atol": 0}
    apps = {"question": "Print the sum.", "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})}
    broken = {**row, "task_id": "HumanEval/1", "canonical_solution": "    raise ValueError\n", "prompt": "def add(a, b):\n    \"\"\" Other. \"\"\"\n"}
    with gzip.open(tmp_path / "code.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in (row, apps, broken))
    with gzip.open(tmp_path / "code.jsonl.gz", "at") as file:  # rows that are no tasks, whatever their columns
        file.writelines(json.dumps(r) + "\n" for r in (
            {"question": "q", "inputs": ["not json"], "outputs": ["1"], "fn_name": "f"}, {**row, "base_input": None, "test": None, "problem": "P?"},
            {"test": "x", "entry_point": 5, "prompt": None}, {"problem": "What is 1+1?", "answer": "2", "test_list": None, "inputs": None}))
    output = tmp_path / "code.jsonl"
    status, said, _ = run(capsys, "code", "--from", tmp_path / "code.jsonl.gz", "--output", output)
    assert status == 0 and "dropped 3: tests that cannot be read" in said and "dropped 1: no answer" in said
    function, program, plain = load_problems([output])
    assert plain.answer == "2" and plain.tests is None
    assert function.id == "code-HumanEval/0" and function.tests.cases == (("(1, 2)", "3"), ("(0, 0)", "0"), ("([1], [2])", "[1, 2]"))
    assert program.tests.entry_point is None and program.tests.cases == (("1 2\n", "3\n"),)


def test_a_data_set_by_its_name_on_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder laid out as a repository there is read by the same library call."""
    folder = tmp_path / "org/aime"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"problem_idx": i, "problem": f"P{i}?", "answer": i} for i in range(3)]),
                                folder / "train-00000-of-00001.parquet")
    output = tmp_path / "aime.jsonl"
    status, said, error = run(capsys, "mine", "--from", folder, "--output", output)
    assert status == 0, error
    assert [p.id for p in load_problems([output])] == ["mine-0", "mine-1", "mine-2"]
    status, _, error = run(capsys, "mine", "--from", folder, "--split", "validation", "--output", output)
    assert status == 1 and "could not load it" in error and "validation" in error


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "nothing to prepare"), (["unknown"], "'unknown' is not registered"), (["a", "b", "--from", "x.jsonl"], "are of one data set"),
    (["n", "--from", "gone.jsonl"], "no such file"), (["n", "--from", "{tmp}/rows.jsonl", "--column", "text=x"], "expected FIELD=COLUMN"),
    (["n", "--from", "{tmp}/rows.jsonl", "--decontaminate", "gone.jsonl"], "no file at gone.jsonl"),
    (["n", "--from", "{tmp}/rows.jsonl"], "none of 1 rows"),
    (["n", "--from", "{tmp}/rows.jsonl", "--ngram", "0", "--decontaminate", "{tmp}/good.jsonl"], "ngram >= 1"),
    (["n", "--from", "{tmp}/rows.jsonl", "--decontaminate", "{tmp}/good.jsonl", "{tmp}/other/good.jsonl"], "are both called 'good'"),
    (["n", "--from", "{tmp}/no.jsonl.gz"], "gzip"), (["--verify"], "name the files"), (["{tmp}/good.jsonl", "--verify"], "no prepared file"),
    (["n", "--from", "{tmp}/good.jsonl", "--output", "out.json"], "must end in .jsonl"),
    (["n", "--from", "{tmp}/broken.jsonl"], "line 2: not JSON"), (["n", "--from", "{tmp}/list.jsonl"], "line 1: holds a list"),
])
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"problem": "P?"}\n')
    (tmp_path / "broken.jsonl").write_text('{"problem": "P?", "answer": "1"}\n{"problem": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "no.jsonl.gz").write_text("plain\n")
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        (folder / "good.jsonl").write_text('{"problem": "P?", "answer": "1"}\n')
    output = [] if not arguments or "b" in arguments or "--output" in arguments else ["--output", str(tmp_path / "out.jsonl")]
    status, _, error = run(capsys, *(argument.replace("{tmp}", str(tmp_path)) for argument in arguments), *output)
    assert status == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_decontamination_by_shared_word_sequences() -> None:
    held_out = Problem(id="h", prompt="Find the number of ordered pairs (a, b) of positive integers with $a + b = 100$ and a < b.", answer="49")
    short = Problem(id="s", prompt="What is 2+2?", answer="4")
    check = Decontamination({"bench": [held_out, short]})
    assert check.match(held_out.prompt) == ("bench", "h")
    rewritten = "In a warm-up: find THE number of ordered pairs $(a,b)$ of positive integers with \\(a+b=100\\) and $a<b$. Explain."
    assert check.match(rewritten) == ("bench", "h")
    assert check.match("Find the number of ordered pairs (a, b) of real numbers with $a b = 360$.") is None, "a common opening"
    assert Decontamination({"bench": [held_out]}, coverage=1.0).match(held_out.prompt.replace("100", "99")) is None
    assert check.match("what is $2 + 2$ ?") == ("bench", "s") and check.match("What is 2+3 and 2+2?") is None
    assert words("$\\frac{1}{2}$, x_1!") == ("frac", "1", "2", "x", "1")
    assert check.match("Solve: what is 2 + 2? Explain.") == ("bench", "s"), "a short one stands in it as a whole"
    with pytest.raises(ValueError, match="coverage"):
        Decontamination({}, coverage=0)


def test_the_real_files(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said, _ = run(capsys, "dapo_math_17k", "--from", real_data / "raw/dapo_math_17k.parquet", "--output", tmp_path / "dapo.jsonl",
                          "--decontaminate", real_data / "eval/aime2024.jsonl", real_data / "eval/aime2026.jsonl")
    assert status == 0, said
    manifest = json.loads((tmp_path / "dapo.jsonl.manifest.json").read_text())
    assert manifest["rows"] == 17917 and manifest["problems"] + sum(manifest["dropped"].values()) == 17917
    assert manifest["dropped"] == {"copy of an earlier row": 717, "same problem with different answers": 24, "contaminated by aime2026": 1}
    assert not any("Answer:" in p.prompt[-60:] for p in load_problems([tmp_path / "dapo.jsonl"]))
    status, said, _ = run(capsys, "math_train", "--from", real_data / "train/math_train.jsonl", "--output", tmp_path / "math.jsonl",
                          "--decontaminate", real_data / "eval/math500.jsonl")
    assert status == 0 and "contaminated by math500" in said
