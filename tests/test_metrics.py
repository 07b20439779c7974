"""The writer of metrics: refusals, crash damage, resume equal to an uninterrupted run, mirrors, stage times."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_antisd.config import ConfigError, LoggingConfig
from megatron_antisd.metrics import STAGES, STEP_KEYS, MetricsError, MetricsWriter, StageTimer, read_metrics, read_rows
from megatron_antisd.metrics.journal import Journal, read_journal

QUIET = LoggingConfig(tensorboard=False, progress=False)
STEPS = 6


def open_writer(directory: Path, *, resume_step: int | None = None, config: LoggingConfig = QUIET, is_writer: bool = True) -> MetricsWriter:
    return MetricsWriter(directory, config=config, total_steps=STEPS, resume_step=resume_step, run_name="test", is_writer=is_writer)


def row(step: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(STEP_KEYS[1:], None)
    return values | {"reward_mean": step / 10, "gate_open": step > 3, "tokens": 100 * step, "seconds_total": 1.5} | changes


def train(writer: MetricsWriter, steps: range) -> None:
    """What the loop writes: the evaluation of the untrained policy, then step, evaluation every second step, samples, u."""
    for step in steps:
        if step > 0:
            writer.log(step, row(step))
            writer.log_token_u(step, [{"kind": "WAIT", "mean_u": -step / 7, "count": step}])
        if step % 2 == 0:
            writer.log_evaluation(step, {"eval/search/avg@4": step / 8, "eval/search/pass@4": step / 7})
            writer.log_samples(step, [sample(f"answer {step}\u2028\u00e9")])


def sample(response: str) -> dict[str, Any]:
    return {"problem_id": "p", "prompt": "q", "response": response, "reward": 1.0, "truncated": False}


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.jsonl")}


def test_step_keys_are_the_contract() -> None:
    contract = """step, reward_mean, reward_completed_mean, response_length_mean, truncation_rate, student_entropy_mean,
    teacher_entropy_median, gate_open, gate_warm, gate_down, lambda, u_mean, u_negative_share, phi_bound_share, loss, grad_norm,
    clip_fraction, mismatch_kl, mismatch_max, tokens, tokens_per_second, seconds_total, seconds_generate, seconds_grade,
    seconds_teacher, seconds_step, seconds_sync"""
    assert set(STEP_KEYS) == {key.strip() for key in contract.split(",")}
    assert len(STEP_KEYS) == len(set(STEP_KEYS))


def test_rows_are_strict_json_and_merge_by_step(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, range(0, 3))
        # Read while the writer is open: what was logged is in the file.
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [line["step"] for line in parsed] == [0, 1, 2, 2]
    merged = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in merged] == [0, 1, 2]
    assert merged[0] == {"step": 0, "eval/search/avg@4": 0.0, "eval/search/pass@4": 0.0}
    assert merged[1] == {"step": 1, **row(1)}  # None stays null and comes back as None
    assert merged[2] == {"step": 2, **row(2), "eval/search/avg@4": 0.25, "eval/search/pass@4": 2 / 7}
    assert read_rows(tmp_path / "samples.jsonl")[1]["response"] == "answer 2\u2028\u00e9"


def test_missing_keys_are_named(tmp_path: Path) -> None:
    values = row(1)
    del values["u_mean"], values["seconds_sync"]
    with open_writer(tmp_path) as writer, pytest.raises(MetricsError, match=r"step 1.*'u_mean', 'seconds_sync'"):
        writer.log(1, values)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    with open_writer(tmp_path) as writer:
        with pytest.raises(MetricsError, match="grad_norm is (nan|inf|-inf)"):
            writer.log(1, row(1, grad_norm=value))
        with pytest.raises(MetricsError, match="extra"):
            writer.log(1, row(1, extra=value))
        with pytest.raises(MetricsError, match="eval/seconds"):
            writer.log_evaluation(1, {"eval/seconds": value})
        with pytest.raises(MetricsError, match="mean_u"):
            writer.log_token_u(1, [{"kind": "WAIT", "mean_u": value, "count": 1}])
        writer.log(1, row(1))  # a refused row left nothing behind
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_other_bad_input_is_refused(tmp_path: Path) -> None:
    import torch

    with open_writer(tmp_path) as writer:
        with pytest.raises(MetricsError, match=r"loss is a Tensor.*\.item\(\)"):
            writer.log(1, row(1, loss=torch.tensor(1.0)))
        with pytest.raises(MetricsError, match="log_evaluation"):
            writer.log(1, row(1) | {"eval/search/avg@1": 0.5})
        with pytest.raises(MetricsError, match="sets 'step' itself"):
            writer.log(1, row(1) | {"step": 1})
        with pytest.raises(MetricsError, match="begin with 'eval/'"):
            writer.log_evaluation(0, {"search/avg@1": 0.5})
        with pytest.raises(MetricsError, match="fraction from 0 to 1"):
            writer.log_evaluation(0, {"eval/search/avg@1": 50.0})
        with pytest.raises(MetricsError, match=r"lacks \['truncated'\]"):
            writer.log_samples(0, [{k: v for k, v in sample("x").items() if k != "truncated"}])
        with pytest.raises(MetricsError, match="sets 'step' itself"):
            writer.log_samples(1, [sample("x") | {"step": 1}])
        for step in (0, STEPS + 1):  # steps count from 1
            with pytest.raises(MetricsError, match="out of order"):
                writer.log(step, row(step))
        writer.log(2, row(2))
        with pytest.raises(MetricsError, match="out of order: expected a step after 2"):
            writer.log(2, row(2))


@pytest.mark.parametrize("checkpoint", [1, 2, 4, 6])
def test_resumed_run_writes_the_same_bytes(tmp_path: Path, checkpoint: int) -> None:
    with open_writer(tmp_path / "whole") as writer:
        train(writer, range(0, STEPS + 1))
    with open_writer(tmp_path / "killed") as writer:
        train(writer, range(0, min(checkpoint + 2, STEPS) + 1))  # ran beyond its last checkpoint
    with open_writer(tmp_path / "killed", resume_step=checkpoint + 1) as writer:
        train(writer, range(checkpoint + 1, STEPS + 1))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 3


def test_killed_process_loses_nothing_that_was_logged(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_metrics import open_writer, train\n"
        "writer = open_writer(Path(sys.argv[1])); train(writer, range(0, 4)); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "killed"), str(here)], cwd=here.parent, capture_output=True, timeout=120
    )
    assert done.returncode == -9, done.stderr.decode()
    with open_writer(tmp_path / "whole") as writer:
        train(writer, range(0, 4))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_line_cut_by_a_crash_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_writer(tmp_path / "whole") as writer:
        train(writer, range(0, STEPS + 1))
    with open_writer(tmp_path / "cut") as writer:
        train(writer, range(0, 5))
    path = tmp_path / "cut" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert read_metrics(path)[-1]["step"] == 4  # the step's row is whole, its evaluation is cut
        assert "dropping the last line" in caplog.text
        with open_writer(tmp_path / "cut", resume_step=4) as writer:
            train(writer, range(4, STEPS + 1))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b'{"step": 1, "loss": NaN}\n', b'{"step": 1, "lo\n', b"[1]\n", b'{"loss": 1}\n', b"\n"])
def test_damage_elsewhere_is_an_error(tmp_path: Path, damage: bytes) -> None:
    with open_writer(tmp_path) as writer:
        train(writer, range(0, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damage + path.read_bytes())
    with pytest.raises(MetricsError, match="line 1 is broken"):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(MetricsError, match="line 1 is broken"):
        open_writer(tmp_path, resume_step=2)
    assert path.read_bytes() == before


def test_same_key_twice_in_a_step_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n')
    with pytest.raises(MetricsError, match="step 1 has .*loss.* twice"):
        read_metrics(path)


def test_new_run_moves_an_old_one_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with caplog.at_level(logging.WARNING), open_writer(tmp_path) as writer:
            train(writer, range(0, 3))
    assert "moved to *.old-2" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "metrics.jsonl.old-1").read_bytes()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_new_run_does_not_inherit_checkpoints(tmp_path: Path) -> None:
    """Or a later resume would take the earlier run's, at a step that this run has not reached."""
    (tmp_path / "checkpoints/step_000080").mkdir(parents=True)
    with open_writer(tmp_path) as writer:
        train(writer, range(0, 1))
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "checkpoints.old-1/step_000080").is_dir()


def test_new_run_does_not_mix_its_traces_with_an_earlier_runs(tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "trace.json").touch()
    (tmp_path / "checkpoints").mkdir()  # empty: a disk mounted for this run, say
    with open_writer(tmp_path) as writer:
        train(writer, range(0, 1))
    assert not (tmp_path / "profile").exists() and (tmp_path / "profile.old-1").is_dir()
    assert (tmp_path / "checkpoints").is_dir() and not (tmp_path / "checkpoints.old-1").exists()


def test_other_ranks_do_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_writer(tmp_path / "rank1", is_writer=False, config=LoggingConfig(wandb_project="never-opened")) as writer:
        train(writer, range(0, 3))
    assert not (tmp_path / "rank1").exists()
    assert capsys.readouterr().out == ""


def test_console_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_writer(tmp_path) as writer:
        writer.log_evaluation(0, {"eval/search/avg@4": 0.125, "eval/seconds": 3.0})
        writer.log(2, row(2, teacher_entropy_median=0.25, u_mean=-0.5, u_negative_share=0.75, seconds_generate=1.25))
    evaluation, step = capsys.readouterr().out.splitlines()
    assert evaluation == "[0/6] evaluation: search/avg@4 0.125"
    assert step.startswith("[2/6] reward 0.200 len - trunc - | gate closed H 0.250 (down - warm -) lambda - u -0.500 (75% < 0)")
    assert "1.50 s: generate 1.25 grade -" in step
    assert step.endswith("| eta 0:00:06")  # 4 steps to go at 1.5 s; all that is known after one step


def test_tensorboard_holds_the_values_and_forgets_what_runs_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = LoggingConfig(tensorboard=True, progress=False)
    with open_writer(tmp_path, config=config) as writer:
        train(writer, range(0, 5))
    with open_writer(tmp_path, config=config, resume_step=3) as writer:
        for step in range(3, 6):
            writer.log(step, row(step, reward_mean=0.5))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value, abs=1e-7)) for e in events.Scalars("reward_mean")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.5),
        (4, 0.5),
        (5, 0.5),
    ]
    assert [e.step for e in events.Scalars("eval/search/avg@4")] == [0, 2]
    assert "loss" not in events.Tags()["scalars"]  # it was None


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoggingConfig(tensorboard=False, progress=False, wandb_project="antisd")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        open_writer(tmp_path / "without", config=config)
    monkeypatch.undo()
    pytest.importorskip("wandb")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "offline")
    for resume_step, steps in ((None, range(0, 3)), (3, range(3, 5))):
        with open_writer(tmp_path / "with", config=config, resume_step=resume_step) as writer:
            train(writer, steps)
    assert (tmp_path / "with" / "wandb_id.txt").read_text().strip()
    assert len(list((tmp_path / "with" / "wandb").glob("offline-run-*"))) >= 1


def test_stage_timer() -> None:
    calls: list[int] = []
    timer = StageTimer(synchronize=lambda: calls.append(1))
    with timer("generate"):
        time.sleep(0.02)
    with timer("generate"):
        time.sleep(0.02)
    with timer("grade", hidden=True):
        pass
    with pytest.raises(ZeroDivisionError), timer("probe"):
        1 / 0  # noqa: B018
    seconds = timer.seconds()
    assert set(seconds) == {*(f"seconds_{stage}" for stage in STAGES), "seconds_hidden_grade", "seconds_probe", "seconds_total"}
    assert seconds["seconds_generate"] >= 0.04  # both times, no upper bound: the machine may be busy
    assert seconds["seconds_teacher"] is None and seconds["seconds_grade"] is None
    assert seconds["seconds_total"] >= seconds["seconds_generate"]
    assert len(calls) == 8


def test_stage_timer_marks_stages_and_ends_with_its_block() -> None:
    open_, seen = [], []

    @contextlib.contextmanager
    def named_range(name: str) -> Iterator[None]:
        open_.append(name)
        yield
        seen.append(open_.pop())

    with StageTimer(named_range=named_range) as timer:
        with timer("generate"):
            assert open_ == ["generate"]
        with timer("figures"), timer("grade", hidden=True):
            assert open_ == ["figures", "grade"]
    assert seen == ["generate", "grade", "figures"]
    seconds = timer.seconds()
    time.sleep(0.01)
    assert timer.seconds() == seconds, "the step is over"
    assert seconds["seconds_total"] >= seconds["seconds_generate"] + seconds["seconds_figures"]


def test_a_stage_inside_a_stage_would_count_twice() -> None:
    timer = StageTimer()
    with timer("step"), pytest.raises(RuntimeError, match="stage 'sync' inside stage 'step' would count twice"), timer("sync"):
        pass
    with timer("sync"):
        pass  # the refusal left nothing open
    assert timer.seconds()["seconds_sync"] is not None


def test_a_journal_line_cut_off_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    Journal(tmp_path, is_writer=True).write("resumed", 1, "whole")
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-01-01T00:00:00+00:00", "ste')
    Journal(tmp_path, is_writer=False)  # another rank's: no business of its
    assert not (tmp_path / "journal.jsonl").read_bytes().endswith(b"\n")
    Journal(tmp_path, is_writer=True).write("resumed", 2, "the next")
    assert [(row["step"], row["message"]) for row in read_journal(tmp_path)] == [(1, "whole"), (2, "the next")]
