"""What the pages say exists: files they link to and name, configuration keys in their commands, every metric, the GPU example's layout."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_antisd import batch
from megatron_antisd.config import known_keys, load_config, rules
from megatron_antisd.metrics import STEP_KEYS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
NAMED_FILE = re.compile(r"\b((?:examples|tools|tests|docs|docker|benchmarks|megatron_antisd)/[\w./-]*\w\.(?:py|sh|yaml|md|gpu|cpu))\b")
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
OVERRIDE = re.compile(r"(?<![\w./])([a-z_]+(?:\.[a-z_]+)+)=")
WRITTEN_LATER = {"docs/quickstart.png"}  # by a person, from a run

QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "norm_topk_prob": True, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "max_position_embeddings": 40960, "vocab_size": 151936,
}


def name_of(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [target for target in LINK.findall(text) if not target.startswith("http")]
    missing = [target for target in links if not (page.parent / target).exists()]
    missing += [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    assert set(missing) <= WRITTEN_LATER


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_overrides_name_keys_that_exist(page: Path) -> None:
    unknown = set(OVERRIDE.findall(page.read_text())) - set(known_keys())
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_and_json_blocks_name_keys_that_exist(page: Path) -> None:
    for language, text in BLOCK.findall(page.read_text()):
        if language == "json":
            json.loads(text)
        if language == "yaml":
            raw = yaml.safe_load(text)
            raw.pop("base", None)
            given = {f"{section}.{key}" for section, values in raw.items() for key in values}
            assert given <= set(known_keys())


def test_every_metric_is_explained() -> None:
    words = set(re.findall(r"`([\w@/]+)`", (ROOT / "docs/metrics.md").read_text()))
    figures = next(node for node in ast.walk(ast.parse((ROOT / "megatron_antisd/stages.py").read_text()))
                   if isinstance(node, ast.FunctionDef) and node.name == "figures")
    keys = {key.value for node in ast.walk(figures) if isinstance(node, ast.Dict) for key in node.keys if isinstance(key, ast.Constant)}
    keys |= {*STEP_KEYS, "zero_variance_groups", *batch.u_figures(batch.no_teacher([1]), None), *batch.update_figures([], [])}
    assert not keys - words


def test_qwen3_30b_a3b_example_keeps_the_rules_on_32_ranks() -> None:
    config = load_config(ROOT / "examples/qwen3_30b_a3b.yaml", ["model.path=m", "data.train=[t.jsonl]"])
    rules.check_layout(config, QWEN3_30B_A3B, 32)
    assert rules.data_parallel_size(config, 32) == 8
    assert (config.rollout.problems_per_step, config.rollout.group_size, config.optimizer.lr, config.run.steps) == (32, 8, 1e-6, 200)
