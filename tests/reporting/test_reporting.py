"""Loading, pictures and texts of runs made by the real writer with known numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from reporting.synthetic_runs import write_run

from megatron_antisd.config import ConfigError
from megatron_antisd.metrics import MetricsError
from megatron_antisd.reporting import load_run, plot_runs, report_text, write_report
from megatron_antisd.reporting.commands import main
from megatron_antisd.reporting.plots import smooth
from megatron_antisd.reporting.runs import distinct_names, gate_intervals, group_runs, method_label, method_labels

ROOT = Path(__file__).resolve().parents[2]
ACCURACY = {0: 0.125, 10: 0.25, 20: 0.5, 30: 0.75, 40: 0.625}


@pytest.fixture(scope="module")
def antisd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "quickstart", accuracy=ACCURACY, noise=0.02)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "grpo", method="grpo", accuracy=ACCURACY)


def ink(path: Path) -> float:
    """Share of pixels that are not white."""
    return float((image.imread(path)[..., :3].min(axis=-1) < 0.98).mean())


def test_load_run(antisd: Path) -> None:
    run = load_run(antisd)
    assert run.accuracy() == run.accuracy("search") == ACCURACY
    assert run.benchmarks == ["eval/search/avg@1"]
    assert len(run.training) == 40 and len(run.rows) == 41
    steps, values = run.series("gate_warm")
    assert steps == list(range(1, 41)) and math.isnan(values[4]) and values[5] == 0.2
    assert gate_intervals(run) == [("warm-up", 1, 5), ("open", 6, 20), ("closed", 21, 30), ("open", 31, 40)]
    with pytest.raises(MetricsError, match=r"benchmark 'aime'.*\['search'\]"):
        run.accuracy("aime")


def test_accuracy_is_missing_where_one_benchmark_is(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", accuracy={0: 0.5, 10: 0.5})
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "eval/other/avg@2": 0.25}\n{"step": 10, "eval/other/avg@2": null}\n')
    assert load_run(directory).accuracy() == {0: 0.375}


def test_what_is_no_run_is_refused(tmp_path: Path, antisd: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.yaml"):
        load_run(tmp_path)
    (tmp_path / "config.yaml").write_text("modle: {}\n")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(MetricsError, match="no rows yet"):
        load_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes((antisd / "metrics.jsonl").read_bytes())
    with pytest.raises(ConfigError, match=r"config.yaml(?s:.*)unknown key 'modle'"):
        load_run(tmp_path)


def test_labels_show_what_differs(tmp_path: Path) -> None:
    runs = [
        load_run(write_run(tmp_path / name, accuracy={0: 0.1}, steps=1, method=method, **more))
        for name, method, more in (
            ("a", "antisd", {"std": "biased"}), ("b", "antisd", {"std": "biased", "compose": "multiplicative"}),
            ("c", "grpo", {"std": "biased", "lambda_max": 0.1}),
        )
    ]  # fmt: skip
    assert method_label(runs[0].config) == "antisd (std=biased)"
    assert method_label(runs[2].config) == "grpo (std=biased)"  # lambda does nothing there
    assert method_labels(runs) == ["antisd", "antisd (compose=multiplicative)", "grpo"]
    assert method_labels(runs[:1]) == ["antisd (std=biased)"]


def test_groups_are_repetitions(tmp_path: Path) -> None:
    same = [load_run(write_run(tmp_path / f"seed-{seed}", seed=seed, accuracy={0: 0.1}, steps=1)) for seed in (0, 1)]
    other = load_run(write_run(tmp_path / "lr", seed=0, accuracy={0: 0.1}, steps=1))
    assert {label: len(runs) for label, runs in group_runs(same).items()} == {"antisd": 2}
    assert list(group_runs([*same, other])) == ["antisd: seed-0", "antisd: seed-1", "antisd: lr"]
    assert distinct_names(["runs/a/hf", "runs/b/hf", "runs/a/hf"]) == ["a/hf", "b/hf", "a/hf"]


def test_smooth_against_a_loop() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0, 8.0])
    assert np.allclose(smooth(values, 3), [1.5, 1.5, math.nan, 6.0, 6.0], equal_nan=True)
    assert np.allclose(smooth(values, 1), values, equal_nan=True)


def test_report_holds_the_numbers(antisd: Path, tmp_path: Path) -> None:
    text_path, picture = write_report(antisd, tmp_path / "out")
    text = text_path.read_text()
    assert "Method **antisd**" in text and "No update was skipped" in text
    assert "| search/avg@1 | 12.5% @0 | 62.5% @40 | +50.0 | 75.0% @30 |" in text
    assert "warm-up 1-5, open 6-20, closed 21-30, open 31-40" in text and "Open in 25 of 40 steps" in text
    assert "H_warm = 0.2000 nats, tau_down = 0.1860 nats (from step 6)" in text
    assert "| WAIT | -1.250 (40) | -1.650 (40) |" in text
    for step in (0, 40):
        assert f"ANS 3 EOS from step {step}" in text
    assert text.count("Q 1 2 3 A") == 1 and "TRY 5" not in text
    assert "| generate | 2.000 | 50.0% |" in text and "| teacher | 0.500 | 12.5% |" in text
    assert "2.7 minutes" in text  # 40 steps of 4 seconds
    assert "mean 1.00e-06" in text and "4.00e-03 nats at step 40" in text
    assert image.imread(picture).shape[:2] >= (900, 1200) and ink(picture) > 0.03


def test_report_says_what_is_absent(grpo: Path, tmp_path: Path) -> None:
    for name in ("samples.jsonl", "token_u.jsonl"):
        (grpo / name).unlink()
    text = report_text(load_run(grpo))
    assert "no teacher term, so there is no gate" in text
    assert "no teacher scored its tokens" in text and "no token_u.jsonl" in text
    assert "no samples.jsonl" in text
    assert "| teacher | - | did not run |" in text


def test_report_of_an_unfinished_run_without_evaluation(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", accuracy={}, steps=8)
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:50])  # killed while it wrote step 4
    text = report_text(load_run(directory))
    assert "3 of 8 steps (unfinished)" in text and "was not evaluated" in text
    assert "Steps: warm-up 1-3. Open in 0 of 3 steps. The gate was not calibrated" in text
    assert ink(plot_runs([load_run(directory)], tmp_path / "out.png")) > 0.02


def test_response_cannot_leave_its_code_block(antisd: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    directory.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        (directory / name).write_bytes((antisd / name).read_bytes())
    row = '{"step": 0, "problem_id": "p", "prompt": "q", "response": "```\\n# not a heading", "reward": null, "truncated": true}\n'
    (directory / "samples.jsonl").write_text(row)
    text = report_text(load_run(directory))
    assert "````text\n```\n# not a heading\n````" in text
    assert "step 0 only" in text and "not graded, truncated" in text


def test_pictures_of_several_runs(antisd: Path, grpo: Path, tmp_path: Path) -> None:
    seeds = [load_run(write_run(tmp_path / f"sd-{seed}", method="sd", seed=seed, accuracy=ACCURACY, noise=0.02)) for seed in (0, 1)]
    picture = plot_runs([load_run(antisd), load_run(grpo), *seeds], tmp_path / "new" / "several.png")
    assert ink(picture) > 0.03
    many = [load_run(write_run(tmp_path / f"r{i}", accuracy={0: 0.1}, steps=2, base=f"m/{i % 2}", clip=0.1 + i / 50)) for i in range(9)]
    assert ink(plot_runs(many, tmp_path / "many.png")) > 0.02  # more runs than colours
    with pytest.raises(ValueError, match="no runs"):
        plot_runs([], tmp_path / "none.png")


def test_commands(antisd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(antisd), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "report.md").is_file()
    assert main(["plot", str(tmp_path / "nowhere")]) == 1
    assert "is no run directory" in capsys.readouterr().err
    done = subprocess.run([sys.executable, str(ROOT / "tools/plot_run.py"), str(antisd), "--output", str(tmp_path / "curves.png")],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").is_file()
