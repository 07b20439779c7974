"""examples/dapo on DAPO-Math-17k, both files, with Qwen3's tokenizer; needs ANTISD_DATA."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny_world import rows_of

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "examples/dapo/run.sh"
VOCABULARY = 151936


def run(*arguments: str | Path, environment: dict[str, str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ANTISD_DATA", "FORMAT", "OUTPUT")}
    return subprocess.run(["bash", str(RUN), *map(str, arguments)], env={**kept, **environment}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=timeout)


@pytest.mark.parametrize(("arguments", "environment", "reason"), [
    ((), {}, "no data: set ANTISD_DATA, or give DATA_FILE TOKENIZER_DIR"),
    (("only.jsonl",), {}, "got only only.jsonl, expected DATA_FILE TOKENIZER_DIR"),
    (("a.jsonl", "b", "c", "d"), {}, "got 4 paths"),
    (("absent.jsonl", "b"), {}, "no file at absent.jsonl"),
    ((), {"ANTISD_DATA": "absent"}, "no file at absent/train/dapo_math_17k.jsonl"),
    ((), {"ANTISD_DATA": "absent", "FORMAT": "csv"}, "FORMAT=csv: expected jsonl, parquet or both"),
])
def test_absent_input_is_named_before_anything_starts(arguments: tuple[str, ...], environment: dict[str, str], reason: str) -> None:
    done = run(*arguments, environment=environment)
    assert done.returncode == 2 and reason in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_json_lines_and_parquet_with_qwen3s_vocabulary(tmp_path: Path) -> None:
    data = os.environ.get("ANTISD_DATA")
    if not data:
        pytest.skip("ANTISD_DATA is not set")
    # The Parquet file has no solutions and a random model solves nothing: with the math grader nothing would move.
    done = run("grading.function=examples.dapo.even_length:grade", environment={"ANTISD_DATA": data, "OUTPUT": str(tmp_path)}, timeout=1400)
    assert done.returncode == 0, done.stdout[-6000:]
    assert "dapo_math_17k.jsonl: 16267 problems" in done.stdout and "dapo_math_17k.parquet: 17243 problems" in done.stdout
    assert json.loads((tmp_path / "model/config.json").read_text())["vocab_size"] == VOCABULARY
    for format_ in ("jsonl", "parquet"):
        rows = rows_of(tmp_path / format_)
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(row["mismatch_max"] < 1e-4 and row["probe_max"] < 1e-4 and row["grad_norm"] > 0 for row in rows)
        assert all(11.5 < row["student_entropy_mean"] < 11.94 for row in rows), "log 151,936 = 11.93: the entropy is over the whole vocabulary"
        assert sum(row["teacher_masked_rollouts"] < 32 for row in rows) == (3 if format_ == "jsonl" else 0), "only the JSON lines hold solutions"
        with safe_open(next((tmp_path / format_ / "hf").glob("*.safetensors")), framework="pt") as tensors:
            assert tensors.get_slice("lm_head.weight").get_shape()[0] == VOCABULARY
