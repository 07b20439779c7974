"""Files that survive a disk that fills up in the middle of a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_antisd.durable import append_whole
from megatron_antisd.metrics.files import JsonLines, read_rows
from megatron_antisd.models.huggingface import model_files

LIMIT = 4096
FULL_DISK = f"""
import json, resource, signal, sys
from pathlib import Path
from megatron_antisd.metrics.files import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit then fails as on a full disk, after it wrote what fits
path = Path(sys.argv[1])
lines = JsonLines(path, patient=sys.argv[2] == "patient")
resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, resource.RLIM_INFINITY))
try:
    lines.append([{{"step": 2, "text": "y" * 1500}}])
except OSError as error:
    print("raised", error.errno)
print(path.stat().st_size)
lines.forget(int(sys.argv[3]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines.append([{{"step": 3, "text": "z"}}])
"""


def fill(path: Path, kind: str, forget: int = 9) -> list[str]:
    JsonLines(path).append([{"step": 1, "text": "x" * 3000}])
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path), kind, str(forget)], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    raised, _, size = fill(path, "impatient")
    assert raised == "raised" and int(size) == len(json.dumps({"step": 1, "text": "x" * 3000})) + 1
    assert [row["step"] for row in read_rows(path)] == [1, 3]


def test_patience_writes_it_later_and_forgets_what_runs_again(tmp_path: Path) -> None:
    fill(tmp_path / "kept.jsonl", "patient")
    assert [row["step"] for row in read_rows(tmp_path / "kept.jsonl")] == [1, 2, 3]
    fill(tmp_path / "forgotten.jsonl", "patient", forget=2)
    assert [row["step"] for row in read_rows(tmp_path / "forgotten.jsonl")] == [1, 3]


def test_appending_makes_the_file(tmp_path: Path) -> None:
    append_whole(tmp_path / "new", b"a\n")
    append_whole(tmp_path / "new", b"b\n")
    assert (tmp_path / "new").read_bytes() == b"a\nb\n"


def test_a_checkpoints_own_files_are_not_the_models(tmp_path: Path) -> None:
    """Else a run that starts from a checkpoint writes the other run's configuration and state into its own."""
    for name in ("config.json", "tokenizer.json", "manifest.json", "state.json", "run_config.yaml"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in model_files(tmp_path)] == ["config.json", "tokenizer.json"]
