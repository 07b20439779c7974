"""The command over files on disk: scored ones, and saved ones whose contexts are built again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_world import World, configuration, make_world, write

from megatron_antisd.audit.commands import main
from megatron_antisd.config import load_config
from megatron_antisd.data import PromptBuilder, load_problems, load_tokenizer
from megatron_antisd.metrics.scored_rollouts import write_scored
from megatron_antisd.records import Rollout, RolloutGroup, ScoredGroup, ScoredRollout
from megatron_antisd.rollout.replay import save_rollouts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def saved(world: World) -> tuple[Path, list[ScoredGroup]]:
    """A run directory with config.yaml, two scored steps and one saved step, and the groups in it."""
    run = world.root / "run"
    run.mkdir()
    config = load_config(write(configuration(world, run), run / "config.yaml"))
    tokenizer = load_tokenizer(world.checkpoint, 61)
    prompts = PromptBuilder(tokenizer, config.data, config.privileged, 256)
    groups, scored = [], []
    for problem in load_problems([world.train])[:3]:
        texts = [f"wait so \\boxed{{{problem.answer}}}", "double double wait", f"then \\boxed{{{problem.answer}}}"]
        rollouts = []
        for index, text in enumerate(texts):
            ids = (*tokenizer(text)["input_ids"], 2)
            right = index != 1
            feedback = "right" if right else "wrong"
            rollouts.append(Rollout(problem_id=problem.id, index=index, prompt_ids=prompts.student_prompt(problem), response_ids=ids, text=text,
                                    engine_log_probs=(-1.0,) * len(ids), truncated=False, policy_version=0).graded(right, feedback))
        groups.append(RolloutGroup(problem=problem, rollouts=tuple(rollouts)))
        views = prompts.privileged_views(groups[-1], seed=0, step=4)
        scored.append(ScoredGroup(problem=problem, rollouts=tuple(
            ScoredRollout(rollout=r, privileged=v, student_log_prob=(-1.0,) * len(r.response_ids), teacher_log_prob=(-1.5,) * len(r.response_ids))
            for r, v in zip(rollouts, views, strict=True))))
    for step in (2, 4):
        write_scored(run / "rollouts", step, "antisd", scored, lambda token: tokenizer.decode([token]))
    save_rollouts(run / "saved", 4, groups)
    return run, scored


def test_a_sound_run(saved: tuple[Path, list[ScoredGroup]], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = saved
    assert main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "step_000004.jsonl: step 4, 3 groups, 9 rollouts" in said and "solution from: peer 9" in said
    assert "no defects, no alarms" in said and said.count("-- problem") == 1 and "previous" in said
    assert main([str(run), "--step", "2", "--problem", "add-0-1", "--no-grading"]) == 0
    said = capsys.readouterr().out
    assert "step 2" in said and said.count('-- problem "add-0-1"') == 3


def test_contexts_of_saved_rollouts_are_built_again_as_they_were(saved: tuple[Path, list[ScoredGroup]], capsys: pytest.CaptureFixture[str]) -> None:
    run, scored = saved
    assert main([str(run / "saved"), "--prompts", "9"]) == 0
    said = capsys.readouterr().out
    tokenizer = load_tokenizer(run.parent / "model", 61)
    prompts = {tokenizer.decode(list(r.privileged.view.prompt_ids)) for group in scored for r in group.rollouts}
    assert prompts and all(prompt in said for prompt in prompts)


def test_defects_and_alarms_are_printed_and_change_the_exit_status(
    saved: tuple[Path, list[ScoredGroup]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, scored = saved
    first = scored[0].rollouts[1]
    lost = dataclasses.replace(first.privileged, view=dataclasses.replace(first.privileged.view, prompt_ids=first.privileged.view.prompt_ids[:-1]))
    bad_peer = dataclasses.replace(scored[0].rollouts[lost.shown_index].rollout, text="no answer in here")
    rollouts = list(scored[0].rollouts)
    rollouts[1] = dataclasses.replace(first, privileged=lost)
    rollouts[lost.shown_index] = dataclasses.replace(rollouts[lost.shown_index], rollout=bad_peer)
    group = ScoredGroup(problem=scored[0].problem, rollouts=tuple(rollouts))
    path = write_scored(tmp_path, 4, "antisd", [group], lambda token: "")
    assert main([str(path), "--config", str(run / "config.yaml")]) == 1
    said = capsys.readouterr().out
    assert f"ALARM problem '{group.problem.id}', rollout 1: the teacher's prompt ends on" in said
    assert "in 1 of 1 groups the shown solution fails its own grader" in said


def test_what_cannot_be_audited(saved: tuple[Path, list[ScoredGroup]], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, _ = saved
    (tmp_path / "step_000001.jsonl").write_text('{"token_text": 5}\n')
    (tmp_path / "step_000002.jsonl").write_text("[1]\n")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "step_000001.jsonl").write_text((run / "saved/step_000004.jsonl").read_text())
    for arguments, message in (
        ([tmp_path / "gone"], "holds no saved rollouts"), ([run, "--step", "3"], "it has steps [2, 4]"), ([alone], "no config.yaml in the folders"),
        ([run, "--problem", "gone"], "not among the problems"), ([run, "--model", tmp_path], "has no config.json"),
        ([tmp_path / "step_000001.jsonl", "--config", run / "config.yaml"], "line 1 holds no header"),
        ([tmp_path / "step_000002.jsonl", "--config", run / "config.yaml"], "line 1 holds no group of rollouts"),
    ):
        assert main([str(a) for a in arguments]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1, (captured.err, message)
