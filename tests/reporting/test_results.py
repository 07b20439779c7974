"""Table 1, Figure 3 and Figure 4 of synthetic runs whose numbers are known."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image
from reporting.synthetic_runs import write_run

from megatron_antisd.metrics import MetricsError
from megatron_antisd.reporting import Choices, write_results
from megatron_antisd.reporting.commands import main
from megatron_antisd.reporting.paper import paper_result

ROOT = Path(__file__).resolve().parents[2]


def evaluation(aime: float, hmmt: float, *, intervals: bool = True) -> dict[str, float]:
    """avg@4 and pass@1..4 of two benchmarks; half-widths of 0.03 and 0.04, so 0.025 of the mean of both."""
    metrics = {}
    for name, value, half in (("aime", aime, 0.03), ("hmmt", hmmt, 0.04)):
        metrics[f"eval/{name}/avg@4"] = value
        metrics |= {f"eval/{name}/pass@{k}": min(1.0, value + 0.05 * (k - 1)) for k in (1, 2, 3, 4)}
        if intervals:
            metrics |= {f"eval/{name}/low@4": value - half, f"eval/{name}/high@4": value + half}
            for k in (1, 2, 3, 4):
                metrics |= {f"eval/{name}/pass_low@{k}": value - half, f"eval/{name}/pass_high@{k}": min(1.0, value + half + 0.05 * (k - 1))}
        metrics |= {f"eval/{name}/majority@4": value, f"eval/{name}/truncation_rate": 0.1, f"eval/{name}/response_length_mean": 90.0}
    return metrics


GRPO = {0: evaluation(0.1, 0.1), 20: evaluation(0.3, 0.2), 40: evaluation(0.4, 0.2)}  # best: 30.0 at 40
ANTISD = {0: evaluation(0.1, 0.1), 20: evaluation(0.5, 0.3), 40: evaluation(0.4, 0.3)}  # best: 40.0 at 20, reaches 30.0 at 20
SD = {0: evaluation(0.1, 0.1), 20: evaluation(0.2, 0.1), 40: evaluation(0.1, 0.1)}  # never


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    base = "models/Qwen3-8B"
    return [
        write_run(tmp_path / name, method=name, base=base, accuracy={}, evaluations=table)
        for name, table in (("grpo", GRPO), ("antisd", ANTISD), ("sd", SD))
    ]


class Page(HTMLParser):
    """Cells of each table, sources of images, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.loads: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        if tag == "img":
            self.images.append(given["src"] or "")
        self.loads += [f"{tag} {key}" for key in given if key in ("src", "href", "srcset") and tag != "img"]
        self.loads += [tag] * (tag in ("script", "link", "iframe"))

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_table_1_by_hand(runs: list[Path], tmp_path: Path) -> None:
    text = write_results(runs, tmp_path / "out")[0].read_text()
    assert "| model | method | runs | aime avg@4 | hmmt avg@4 | mean | best step | speed-up |" in text
    # The mean's half-width: sqrt(0.03^2 + 0.04^2) / 2 = 0.025.
    assert "| Qwen3-8B | grpo | 1 | 40.0 [37.0, 43.0] | 20.0 [16.0, 24.0] | 30.0 [27.5, 32.5] | 40 | 1.0x |" in text
    assert "| Qwen3-8B | antisd | 1 | 50.0 [47.0, 53.0] | 30.0 [26.0, 34.0] | 40.0 [37.5, 42.5] | 20 | 2.0x |" in text
    assert "| Qwen3-8B | sd | 1 | 20.0 [17.0, 23.0] | 10.0 [6.0, 14.0] | 15.0 [12.5, 17.5] | 20 | never |" in text
    assert "bootstrap over the problems for a single run" in text


def test_seeds_have_an_interval_over_runs(tmp_path: Path) -> None:
    tables = {seed: {0: evaluation(0.1 * seed, 0.2)} for seed in (1, 2, 3)}
    made = [write_run(tmp_path / f"{seed}", method="grpo", seed=seed, accuracy={}, evaluations=table) for seed, table in tables.items()]
    text = write_results(made, tmp_path / "out")[0].read_text()
    # t over three seeds: 0.2 +- 4.302653 * 0.1 / sqrt(3); the mean over benchmarks moves half as much; hmmt does not move at all.
    assert "| 3 | 20.0 [-4.8, 44.8] | 20.0 [20.0, 20.0] | 20.0 [7.6, 32.4] | 0 | from the start |" in text
    assert "Student's t over seeds" in text


def test_other_baselines(runs: list[Path], tmp_path: Path) -> None:
    text = write_results(runs, tmp_path / "sd", Choices(baseline="sd"))[0].read_text()
    assert "| Qwen3-8B | antisd |" in text and "20 | 1.0x |" in text
    text = write_results(runs[1:2], tmp_path / "none")[0].read_text()
    assert "No run is grpo, so there is no speed-up; methods here: antisd." in text and "| 20 | - |" in text


def test_figure_3_is_at_each_runs_best_step(runs: list[Path], tmp_path: Path) -> None:
    written = write_results(runs, tmp_path / "out", Choices(pass_benchmark="hmmt"))
    text = written[0].read_text()
    assert "## Figure 3: pass@k on hmmt" in text and "| run | step | pass@1 | pass@2 | pass@4 |" in text
    assert "| Qwen3-8B, grpo, seed 0 | 40 | 20.0 [16.0, 24.0] | 25.0 [16.0, 29.0] | 35.0 [16.0, 39.0] |" in text
    assert "| Qwen3-8B, antisd, seed 0 | 20 | 30.0" in text
    pictures = {path.name: image.imread(path) for path in written if path.suffix == ".png"}
    assert set(pictures) == {"figure3.png", "figure4.png", "gate.png"}
    for name, pixels in pictures.items():
        assert min(pixels.shape[:2]) > 350 and (pixels[..., :3].min(axis=-1) < 0.9).mean() > 0.02, name
    with pytest.raises(MetricsError, match=r"no run was evaluated on 'amc'; the runs have \['aime', 'hmmt'\]"):
        write_results(runs, tmp_path / "out", Choices(pass_benchmark="amc"))


def test_the_page_is_whole_and_loads_nothing(runs: list[Path], tmp_path: Path) -> None:
    start = time.process_time()
    written = write_results(runs, tmp_path / "out")
    assert time.process_time() - start < 10
    text = written[1].read_text()
    page = Page(text)
    assert page.loads == [] and "http" not in re.sub(r'http-equiv|src="[^"]*"', "", text)
    assert len(page.images) == 3 and all(source.startswith("data:image/png;base64,iVBOR") for source in page.images)
    assert ["Qwen3-8B", "antisd", "1", "50.0 [47.0, 53.0]", "30.0 [26.0, 34.0]", "40.0 [37.5, 42.5]", "20", "2.0x"] in page.rows
    assert 'name="viewport"' in text and "default-src 'none'" in text


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>x</b> & |y", base="models/<script>alert(1)</script>", method="grpo", accuracy={0: 0.5}, steps=2)
    written = write_results([run], tmp_path / "out")
    assert "<script" not in written[1].read_text() and "<b>x" not in written[1].read_text()
    assert r"& \|y" in written[0].read_text()


def test_older_runs_without_intervals_and_pass_at_k(tmp_path: Path) -> None:
    older = {step: {key: value for key, value in row.items() if "/avg@" in key} for step, row in GRPO.items()}
    run = write_run(tmp_path / "grpo", method="grpo", accuracy={}, evaluations=older)
    written = write_results([run], tmp_path / "out")
    text = written[0].read_text()
    assert "| 40.0 | 20.0 | 30.0 | 40 | 1.0x |" in text and "none for a single run" in text
    assert "The runs recorded no pass@k on aime at their best steps." in text
    assert "None of these runs has a teacher term, so there is no gate." in text
    assert {path.name for path in written} == {"results.md", "results.html", "figure4.png"}


def test_an_unfinished_run_is_named(runs: list[Path], tmp_path: Path) -> None:
    path = runs[1] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if int(re.search(r'"step": (\d+)', line)[1]) < 25))
    text = write_results(runs, tmp_path / "out")[0].read_text()
    assert "Unfinished runs (steps done)" in text and "antisd (24 of 40)" in text and "| 24 of 40 |" in text


def test_the_papers_numbers_are_labelled(runs: list[Path], tmp_path: Path) -> None:
    assert "paper:" not in write_results(runs, tmp_path / "without")[0].read_text()
    text = write_results(runs, tmp_path / "with", Choices(paper=True))[0].read_text()
    assert "| speed-up | paper: mean @ best step, speed-up |" in text and "not measured here" in text
    assert "| 2.0x | 65.7 @180, 5.0x |" in text and "| never | 30.6 @60 |" not in text and "| never | 30.6 @200 |" in text
    assert str(paper_result("Qwen/Qwen3-4B-Instruct-2507", "antisd (gate.mode=always)")) == "60.6"
    assert paper_result("Qwen/Qwen3-8B-Base", "antisd") is None
    other = write_run(tmp_path / "other", accuracy={0: 0.5}, steps=2)
    assert "The paper has no row for any of these" in write_results([other], tmp_path / "none", Choices(paper=True))[0].read_text()


def test_bad_input_is_one_clear_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: Path | str) -> str:
        assert main(["results", *map(str, arguments), "--output", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err

    silent = write_run(tmp_path / "silent", method="sd", accuracy={}, steps=3)
    assert "has no evaluations to compare; set evaluation.benchmarks" in error(silent)
    search = write_run(tmp_path / "search", method="sd", base="models/b", accuracy={0: 0.1}, steps=3)
    assert "name one benchmark that all have" in error(runs[0], search)
    assert "no evaluation of benchmark 'hmmt'" in error(runs[0], search, "--benchmark", "hmmt")
    (tmp_path / "empty").mkdir()
    assert "is no run directory" in error(tmp_path / "empty")
    shutil.copytree(runs[0], tmp_path / "again")
    assert "leave one out" in error(runs[0], tmp_path / "again")
    (runs[0] / "metrics.jsonl").write_text("")
    assert "has no rows yet" in error(runs[0])
    assert not (tmp_path / "out").exists()


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/report.py"), *map(str, runs), "--output", str(tmp_path / "out"), "--baseline", "grpo"],
                          cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.splitlines()] == ["results.md", "results.html", "figure3.png", "figure4.png", "gate.png"]
