"""The evaluation program on real checkpoints and engines: alone, interrupted, and inside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import World, configuration, launch, make_world, train, write

from megatron_antisd.config import ConfigError
from megatron_antisd.evaluation.store import read_samples
from megatron_antisd.metrics import read_metrics, read_rows
from megatron_antisd.reporting import load_run

PREFIX = "eval/held-out/"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("evaluate"))


def benchmarks(world: World, samples: int = 4) -> dict[str, Any]:
    return {"every": 2, "benchmarks": [{"name": "held-out", "path": str(world.benchmark), "samples": samples}], "samples_at_once": 12}


@pytest.fixture(scope="module")
def trained(world: World) -> Path:
    """Two steps with the in-process engine, evaluated at 0 and 2, with checkpoints and an export."""
    directory = world.root / "trained"
    train(1, write(configuration(world, directory, run={"steps": 2}, rollout={"engine": "megatron"}, checkpoint={"every": 1},
                                 evaluation=benchmarks(world)), world.root / "trained.yaml"))
    return directory


def alone(world: World, name: str, ranks: int = 1, **sections: dict[str, Any]) -> tuple[Path, str]:
    """Evaluate; the results' directory and the output."""
    raw = configuration(world, world.root / name, **{"evaluation": benchmarks(world), **sections})
    del raw["data"]["train"]  # nothing is trained
    done = launch(ranks, "-m", "megatron_antisd.evaluate", write(raw, world.root / f"{name}.yaml"))
    assert done.returncode == 0, done.stdout[-6000:]
    return world.root / name / "evaluation", done.stdout


def test_a_runs_directory_means_its_newest_checkpoint_and_other_weights_mean_those(world: World, trained: Path, tmp_path: Path) -> None:
    """Two evaluations of one directory stand side by side; a directory whose checkpoints are all damaged is an error, not a step 0."""
    import shutil

    from megatron_antisd.config import load_config
    from megatron_antisd.evaluation.standalone import _step_of, _with_newest_checkpoint

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("hf"))
    own = load_config(run / "config.yaml", [f"run.directory={run}"])
    assert _with_newest_checkpoint(own).model.path == str(run / "checkpoints/step_000002")
    assert _step_of(run / "checkpoints/step_000002") == 2 and _step_of(world.checkpoint) == 0
    first = load_config(run / "config.yaml", [f"run.directory={run}", f"model.path={run}/checkpoints/step_000001"])
    assert _with_newest_checkpoint(first) == first
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_text("{")
    with pytest.raises(ConfigError, match="none of them whole"):
        _with_newest_checkpoint(own)


def only_row(directory: Path) -> dict[str, Any]:
    rows = read_rows(directory / "metrics.jsonl")
    assert len(rows) == 1
    return rows[0]


def texts(path: Path) -> list[str]:
    return [row["text"] for row in read_samples(path)[1]]


def test_a_run_stores_every_sample_and_its_metrics_follow_from_them(world: World, trained: Path) -> None:
    problems = [json.loads(line)["id"] for line in world.benchmark.read_text().splitlines()]
    for step in (0, 2):
        header, samples = read_samples(trained / f"evaluations/step_{step:06d}/held-out.jsonl")
        assert (header["step"], header["samples"]) == (step, 4)
        assert [(row["problem_id"], row["index"]) for row in samples] == [(problem, i) for problem in problems for i in range(4)]
        row = next(row for row in read_metrics(trained / "metrics.jsonl") if row["step"] == step)
        assert row[f"{PREFIX}avg@4"] == pytest.approx(sum(s["reward"] for s in samples) / len(samples))
        assert row[f"{PREFIX}response_length_mean"] == pytest.approx(sum(s["tokens"] for s in samples) / len(samples))
        assert {f"{PREFIX}{key}" for key in ("low@4", "high@4", "pass@3", "pass_low@3", "pass_high@3")} <= row.keys()


@pytest.mark.slow
def test_checkpoints_exports_and_engines_agree(world: World, trained: Path) -> None:
    """The training checkpoint, its Hugging Face export on one rank and on two, through vLLM and the in-process engine: the same samples as the
    run's own evaluation, for the in-process engine; vLLM draws other numbers, so two of its ways are held against each other."""
    own = texts(trained / "evaluations/step_000002/held-out.jsonl")
    checkpoint, _ = alone(world, "of-checkpoint", model={"path": str(trained / "checkpoints/step_000002")}, rollout={"engine": "megatron"})
    assert texts(checkpoint / "evaluations/step_000002/held-out.jsonl") == own
    assert only_row(checkpoint)["step"] == 2
    export, _ = alone(world, "of-export", ranks=2, model={"path": str(trained / "hf")}, rollout={"engine": "megatron"})
    assert texts(export / "evaluations/step_000000/held-out.jsonl") == own
    vllm_of_export, _ = alone(world, "vllm-of-export", model={"path": str(trained / "hf")})
    vllm_of_checkpoint, _ = alone(world, "vllm-of-checkpoint", ranks=2, model={"path": str(trained / "checkpoints/step_000002")},
                                  parallel={"tensor_parallel_size": 2})
    assert texts(vllm_of_export / "evaluations/step_000000/held-out.jsonl") == texts(vllm_of_checkpoint / "evaluations/step_000002/held-out.jsonl")


def test_an_interrupted_evaluation_goes_on(world: World, trained: Path) -> None:
    sections: dict[str, Any] = {"model": {"path": str(trained / "hf")}, "rollout": {"engine": "megatron"}}
    directory, _ = alone(world, "whole", **sections)
    path = directory / "evaluations/step_000000/held-out.jsonl"
    whole, metrics = path.read_bytes(), only_row(directory)
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join(lines[:19]) + b"\n" + lines[19][:20])  # four problems and a half
    _, output = alone(world, "whole", **sections)
    assert "continuing with the samples of 4 problems" in output
    assert path.read_bytes() == whole and only_row(directory) == metrics


def test_a_run_interrupted_in_an_evaluation_makes_up_for_it(world: World, trained: Path) -> None:
    """As the last checkpoint is written before the evaluation: remove the evaluation of step 2 and resume."""
    rows = [line for line in (trained / "metrics.jsonl").read_text().splitlines()]
    cut = [line for line in rows if not (PREFIX in line and json.loads(line)["step"] == 2)]
    assert len(cut) == len(rows) - 1
    (trained / "metrics.jsonl").write_text("\n".join(cut) + "\n")
    path = trained / "evaluations/step_000002/held-out.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    train(1, world.root / "trained.yaml")
    assert path.read_bytes() == whole
    assert sorted(read_metrics(trained / "metrics.jsonl"), key=lambda r: r["step"]) == sorted(
        _merged(rows), key=lambda r: r["step"])


def _merged(lines: list[str]) -> list[dict[str, Any]]:
    merged: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, lines):
        merged.setdefault(row["step"], {}).update(row)
    return list(merged.values())


def test_samples_are_graded_again_without_an_engine(world: World, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answers give the same figures; corrected answers give others, in the samples and in the metrics."""
    import shutil

    from megatron_antisd.evaluation.regrade import main

    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "hf"))
    metrics = (run / "metrics.jsonl").read_text()
    samples = {path: path.read_bytes() for path in run.glob("evaluations/*/*.jsonl")}
    assert main([str(run), "--write"]) == 0
    assert "0 of 32 rewards changed" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == metrics and all(path.read_bytes() == text for path, text in samples.items())

    # Every problem's answer becomes what its first sample says, where that says anything.
    corrected = []
    for line in world.benchmark.read_text().splitlines():
        row = json.loads(line)
        first = next(s for s in read_samples(run / "evaluations/step_000000/held-out.jsonl")[1] if s["problem_id"] == row["id"])
        corrected.append({**row, "answer": first["answer"] or row["answer"]})
    (tmp_path / "corrected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corrected))
    other = tmp_path / "other.yaml"
    other.write_text((run / "config.yaml").read_text().replace(str(world.benchmark), str(tmp_path / "corrected.jsonl")))
    assert main([str(run), "--config", str(other), "--write"]) == 0
    _, again = read_samples(run / "evaluations/step_000000/held-out.jsonl")
    assert all(s["reward"] == 1.0 for s in again if s["index"] == 0 and s["answer"] is not None)
    row = next(row for row in read_metrics(run / "metrics.jsonl") if row["step"] == 0)
    assert row[f"{PREFIX}avg@4"] == pytest.approx(sum(s["reward"] for s in again) / len(again))
    assert (run / "metrics.jsonl.before-regrading-1").read_text() == metrics, "the original stays, however often one grades again"
    assert {path: path.with_name(path.name + ".before-regrading-1").read_bytes() for path in samples} == samples
    before = (run / "metrics.jsonl").read_text()
    capsys.readouterr()
    unfinished = run / "evaluations/step_000002/held-out.jsonl"
    unfinished.write_bytes(b"".join(unfinished.read_bytes().splitlines(keepends=True)[:-1]))
    assert main([str(run), "--config", str(other), "--write"]) == 0 and "step_000002" not in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_text() == before
    unfinished.write_text("[1]\n")
    assert main([str(run)]) == 1 and "line 1 is no header (a list, expected an object)" in capsys.readouterr().err

    assert main([str(run), "--benchmark", "gone"]) == 1 and "the configuration has ['held-out']" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1 and "no configuration file" in capsys.readouterr().err


def test_programming_tasks_go_to_the_sandbox(world: World, trained: Path) -> None:
    """A benchmark with tests, beside one with answers: a model of single words writes no program, and that is what is counted."""
    rows = [{"id": f"code-{i}", "problem": f"double {i}", "tests": {"entry_point": "double", "cases": [[f"({i},)", str(2 * i)]]}} for i in range(2)]
    path = world.root / "code.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory, output = alone(world, "code", model={"path": str(trained / "hf")}, rollout={"engine": "megatron"},
                              evaluation={"benchmarks": [{"name": "code", "path": str(path), "samples": 3}]})
    assert load_run(directory).benchmarks == ["eval/code/avg@3"], "its directory can be reported and graded again"
    assert "sandbox" in output, "which protections there are is said at the start"
    row, (_, samples) = only_row(directory), read_samples(directory / "evaluations/step_000000/code.jsonl")
    assert len(samples) == 6 and {s["answer"] for s in samples} == {None} and {s["reward"] for s in samples} == {0.0}
    assert row["eval/code/avg@3"] == row["eval/code/pass@3"] == 0.0 and "eval/code/majority@3" not in row
