"""YAML file + `key=value` overrides -> a validated `RunConfig`, or one error that lists everything wrong with it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_antisd.config.schema import RunConfig
from megatron_antisd.config.training import ConfigError


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read YAML, apply `a.b=value` overrides (values are YAML), validate. Raises ConfigError. A top-level `base: other.yaml`
    (relative to the file) is merged underneath."""
    raw = _read_yaml(Path(path))
    for text in overrides:
        _override(raw, text)
    return build_config(raw)


def build_config(raw: dict[str, Any]) -> RunConfig:
    """Validate a nested dict. Raises ConfigError with one line per problem."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError("the configuration has problems:\n  " + "\n  ".join(lines)) from error


def dump_config(config: RunConfig) -> str:
    """The full resolved configuration as YAML; `load_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every leaf key, dotted."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += known_keys(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _override(raw: dict[str, Any], text: str) -> None:
    """Set `a.b=value` in the nested dict."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {text!r} is not of the form key=value, e.g. optimizer.lr=1e-6")
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {text!r}: {parent!r} is a value, not a section")
    node[leaf] = _parse_yaml(value, f"override {text!r}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2001-99-99 or a number such as 0x_ is a ValueError
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def _read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: its `base:` leads back to itself")
    if not path.is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error}") from error
    raw = _parse_yaml(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, expected sections such as `model:` and `rollout:`")
    base = raw.pop("base", None)
    if not isinstance(base, str | None):
        raise ConfigError(f"{path}: `base:` must name a file relative to this one, got {base!r}")
    return raw if base is None else _merge(_read_yaml(path.parent / base, (*above, path.resolve())), raw)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        keys = known_keys()
        sections = sorted({k.split(".")[0] for k in keys})
        leaf = key.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(key, keys + sections, n=1, cutoff=0.5)
        near = near or [k for k in keys if k.rsplit(".", 1)[-1] == leaf][:1]
        near = near or difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1] for k in keys], n=1, cutoff=0.0)
        return f"unknown key {key!r}; the nearest valid key is {near[0]!r}"
    if item["type"] == "missing":
        return f"{key} is required and was not given"
    got = "" if item["type"] == "value_error" and not key else f" (got {item['input']!r})"
    return f"{key + ': ' if key else ''}{item['msg'].removeprefix('Value error, ')}{got}"
