"""The table of all configuration keys, made from the schema: type, bounds, default and meaning cannot disagree with the code."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_antisd.config.schema import RunConfig

HEADING = """\
# Configuration keys

Made by `python tools/config_reference.py > docs/configuration_keys.md`; a test holds this page against the schema.
[configuration.md](configuration.md) says how a configuration is read.
"""


def reference_markdown(config: type[BaseModel] = RunConfig) -> str:
    """The whole page: one table a section, in the order of the schema."""
    parts = [HEADING]
    for name, field in config.model_fields.items():
        parts.append(f"## {name}\n\n{_table(field.annotation, f'{name}.')}")
    return "\n".join(parts)


def _table(section: type[BaseModel], prefix: str) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cell(text) for text in row)} |" for row in _rows(section, prefix)]
    return "\n".join(lines) + "\n"


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every leaf; the keys of a list of sections follow it as `key[].inner`."""
    for name, field in section.model_fields.items():
        if _is_section(field.annotation):
            yield from _rows(field.annotation, f"{prefix}{name}.")
            continue
        kind = ", ".join([_type_name(field.annotation), *_bounds(field)])
        yield f"`{prefix}{name}`", kind, _default(field), _meaning(field)
        for inner in get_args(field.annotation):
            if _is_section(inner):
                yield from _rows(inner, f"{prefix}{name}[].")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type_name(annotation: Any) -> str:
    """`int`, `text or null`, `list of text`, `a or b`: words, as one writes them in YAML. Raises TypeError for a type not known here."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in inner)
    if origin is tuple:
        return f"list of {_type_name(inner[0])}" if inner[-1] is Ellipsis else f"list of {len(inner)} {_type_name(inner[0])}"
    if origin is dict:
        return "mapping"
    if _is_section(annotation):
        return "mappings"
    names = {str: "text", int: "int", float: "float", bool: "bool", type(None): "null"}
    if annotation not in names:
        raise TypeError(f"the reference has no name for the type {annotation!r}; add it to _type_name")
    return names[annotation]


def _bounds(field: FieldInfo) -> Iterator[str]:
    symbols = {annotated_types.Ge: ("ge", ">="), annotated_types.Gt: ("gt", ">"), annotated_types.Le: ("le", "<="), annotated_types.Lt: ("lt", "<")}
    for rule in field.metadata:
        if isinstance(rule, annotated_types.MinLen):
            yield f"at least {rule.min_length}"
        elif type(rule) in symbols:
            attribute, symbol = symbols[type(rule)]
            yield f"{symbol} {getattr(rule, attribute)}"


def _default(field: FieldInfo) -> str:
    """As YAML (JSON is YAML)."""
    if field.is_required():
        return "required"
    return f"`{json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False)}`"


def _meaning(field: FieldInfo) -> str:
    """The docstring, with `<` escaped outside of code: a page takes `<name>` for markup and shows nothing."""
    parts = (field.description or "").split("`")
    return "`".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))


def _cell(text: str) -> str:
    """One line, no bar: either would end the table's cell."""
    return " ".join(text.split()).replace("|", "\\|")
