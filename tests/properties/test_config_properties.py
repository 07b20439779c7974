"""The configuration over drawn ones: it survives its own dump, overrides are YAML, what is unknown is named, and nothing crashes."""

from __future__ import annotations

import difflib
import string
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from properties.configurations import JSON, LEAVES, TEXT, flat_configurations, nested, values_of

from megatron_antisd.config import ConfigError, RunConfig, build_config, dump_config, known_keys, load_config

MINIMAL = {"model": {"path": "model"}}
SECTIONS = {key.rpartition(".")[0] for key in LEAVES} | {key.split(".")[0] for key in LEAVES}


def read(text: str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text)
        return load_config(path, overrides)


def test_leaves_are_the_known_keys() -> None:
    assert sorted(LEAVES) == sorted(known_keys())


@settings(max_examples=20)
@given(flat=st.fixed_dictionaries({key: values_of(key) for key in sorted(LEAVES)}))
def test_every_key_is_dumped_and_read_back(flat: dict[str, Any]) -> None:
    config = build_config(nested(flat))
    assert build_config(yaml.safe_load(dump_config(config))) == config


@given(flat=flat_configurations())
def test_dump_reads_back_equal(flat: dict[str, Any]) -> None:
    config = build_config(nested(flat))
    text = dump_config(config)
    again = read(text)
    assert again == config and dump_config(again) == text


@given(flat=flat_configurations(most=6))
def test_overrides_equal_yaml(flat: dict[str, Any]) -> None:
    """Every key on the command line, whether or not the file says something else."""
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1 << 20)}" for key, value in flat.items()]
    assert read("{}", overrides) == build_config(nested(flat))
    assert read(yaml.safe_dump(nested({"model.path": "other", "run.seed": 3})), ["run.seed=0", *overrides]) == build_config(nested(flat))


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str]:
    """(a key, the key with one letter changed, left out or put in)."""
    key = draw(st.sampled_from(sorted(LEAVES)))
    start = key.rindex(".") + 1
    place, letter = draw(st.integers(start, len(key) - 1)), draw(st.sampled_from(string.ascii_lowercase + "_"))
    wrong = draw(st.sampled_from([key[:place] + letter + key[place + 1 :], key[:place] + key[place + 1 :], key[:place] + letter + key[place:]]))
    assume(wrong not in LEAVES and wrong not in SECTIONS and not wrong.endswith("."))
    return key, wrong


@given(pair=misspelt())
def test_a_misspelt_key_is_named_with_one_as_near_as_the_key_meant(pair: tuple[str, str]) -> None:
    meant, wrong = pair
    with pytest.raises(ConfigError) as raised:
        build_config(nested({"model.path": "model", wrong: 1}))
    line = next(line for line in str(raised.value).splitlines() if f"unknown key {wrong!r}" in line)
    named = line.split("the nearest valid key is ")[1].strip("'")
    assert named in LEAVES or named in SECTIONS

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, candidate, wrong).ratio()

    assert likeness(named) >= likeness(meant)


@given(section=st.sampled_from(sorted(SECTIONS)), word=TEXT.filter(lambda word: word and "." not in word), value=JSON)
def test_a_key_of_any_name_that_is_not_known_is_refused(section: str, word: str, value: Any) -> None:
    key = f"{section}.{word}"
    assume(key not in LEAVES and key not in SECTIONS)
    with pytest.raises(ConfigError, match="unknown key .* the nearest valid key is"):
        build_config(nested({"model.path": "model", key: value}))


@given(text=st.text(max_size=40), override=st.text(max_size=20))
@example(text="base: 3", override="run.seed=1")
@example(text="base: [a]", override="run.seed=1")
@example(text="run:", override="run.seed=1")
@example(text="on: 3", override="run.seed=1")
@example(text="model: {path: m}\ndata: {chat_template_kwargs: {date: 2024-07-26}}", override="run.seed=1")
@example(text="model: {path: m}", override="run.name=2001-99-99")
@example(text="model: {path: m}", override="run.name=0x_")
@example(text="model: {path: m}", override="optimizer.lr=.inf")
@example(text="model: {path: m}", override="optimizer.betas=[0.9, 1.5]")
def test_no_text_makes_the_reader_crash(text: str, override: str) -> None:
    try:
        config = read(text, [override])
    except ConfigError:
        return
    assert read(dump_config(config)) == config


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run: {name: \x00}", b"base: 3", b"base: {a: b}"])
def test_files_that_are_no_configuration(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match="run.yaml"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize("override", ["optimizer.lr=.inf", "optimizer.weight_decay=.inf", "optimizer.betas=[0.9, 1.0]", "optimizer.betas=[-0.1, 0.9]",
                                      "data.chat_template_kwargs={date: 2024-07-26}"])
def test_values_that_nothing_can_run_with_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        read(yaml.safe_dump(MINIMAL), [override])
