"""Drawn configurations: any key of the schema with any value that its type and bounds allow."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_antisd.config import RunConfig

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # lone surrogates are in no file
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)


def _holding(*fields: str) -> SearchStrategy[str]:
    """Text around each of the fields, once each and in any order."""
    plain = TEXT.map(lambda text: text.replace("{", "").replace("}", ""))
    return st.tuples(st.permutations(fields), st.lists(plain, min_size=len(fields) + 1, max_size=len(fields) + 1)).map(
        lambda drawn: drawn[1][0] + "".join(field + text for field, text in zip(drawn[0], drawn[1][1:], strict=True)))


BENCHMARK = st.fixed_dictionaries(
    {"name": st.text("ab09_.+-", min_size=1, max_size=6), "path": TEXT},
    optional={"samples": st.integers(1, 64)})
BOUND_BY_RULES: dict[str, SearchStrategy[Any]] = {
    "data.prompt_template": _holding("{problem}"),
    "privileged.template": _holding("{problem}", "{solution}", "{feedback}"),
    "evaluation.benchmarks": st.lists(BENCHMARK, max_size=3, unique_by=lambda benchmark: benchmark["name"]),
    "optimizer.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
    "algorithm.shadow": st.just(False),
    "algorithm.compose": st.just("additive"),
    "algorithm.updates_per_batch": st.just(1),
    "supervision.heartbeat_seconds": st.floats(0.1, 10.0),
    "supervision.silence_seconds": st.floats(21.0, 1e4),
    "supervision.generate_seconds": st.floats(301.0, 1e5),
    "rollout.stall_seconds": st.floats(0.1, 300.0),
}
"""Keys whose values a rule binds beyond type and bounds."""


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key, dotted."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


LEAVES = leaves()


def values_of(key: str) -> SearchStrategy[Any]:
    """What may stand behind a key in YAML."""
    field = LEAVES[key]
    return BOUND_BY_RULES[key] if key in BOUND_BY_RULES else _values(field.annotation, field.metadata)


def _values(annotation: Any, metadata: list[Any]) -> SearchStrategy[Any]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return st.sampled_from(inner)
    if origin in (Union, types.UnionType):
        return st.one_of(*(_values(part, metadata) for part in inner))
    if origin is tuple:
        fewest = max((rule.min_length for rule in metadata if isinstance(rule, annotated_types.MinLen)), default=0)
        assert inner[1] is Ellipsis, annotation
        return st.lists(_values(inner[0], []), min_size=fewest, max_size=3)
    if origin is dict:
        return st.dictionaries(TEXT, JSON, max_size=3)
    return {
        str: lambda: TEXT, bool: st.booleans, type(None): st.none,
        int: lambda: st.integers(**_bounds(metadata, whole=True)),
        float: lambda: st.floats(allow_nan=False, allow_infinity=False, **_bounds(metadata, whole=False)),
    }[annotation]()


def _bounds(metadata: list[Any], *, whole: bool) -> dict[str, Any]:
    bounds: dict[str, Any] = {}
    for rule in metadata:
        if isinstance(rule, annotated_types.Ge):
            bounds["min_value"] = rule.ge
        elif isinstance(rule, annotated_types.Le):
            bounds["max_value"] = rule.le
        elif isinstance(rule, annotated_types.Gt):
            bounds |= {"min_value": rule.gt + 1} if whole else {"min_value": rule.gt, "exclude_min": True}
        elif isinstance(rule, annotated_types.Lt):
            bounds |= {"max_value": rule.lt - 1} if whole else {"max_value": rule.lt, "exclude_max": True}
    return bounds


@st.composite
def flat_configurations(draw: st.DrawFn, most: int = 12) -> dict[str, Any]:
    """Up to `most` keys, dotted, and their values; `model.path` among them."""
    keys = draw(st.lists(st.sampled_from(sorted(LEAVES)), max_size=most, unique=True))
    return {"model.path": draw(TEXT)} | {key: draw(values_of(key)) for key in keys}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """As it stands in a file."""
    raw: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return raw
