"""Python literals as text, both ways: how data sets and `CodeTests.cases` write arguments and expected values.

Beyond `ast.literal_eval`: `inf`, `nan`, `set()`, `frozenset({...})`, and integers of any length.
"""

from __future__ import annotations

import ast
from typing import Any

_NAMES = {"inf": float("inf"), "nan": float("nan")}


def parse_literal(text: str) -> Any:
    """The value a literal stands for. Raises ValueError that names what is no literal."""
    try:
        return ast.literal_eval(text.strip())
    except ValueError:
        pass  # one of the names beyond literal_eval, perhaps
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"not a Python literal ({type(error).__name__}): {text[:100]!r}") from error
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, TypeError) as error:
        raise ValueError(f"not a Python literal ({type(error).__name__}): {text[:100]!r}") from error


def to_literal(value: Any) -> str:
    """Text that `parse_literal` reads back. Raises ValueError for what has no literal."""
    kind = type(value)
    if value is None or kind in (bool, str, bytes, complex, float):
        return repr(value)
    if kind is int:
        return str(value) if -(1 << 64) < value < 1 << 64 else hex(value)  # a decimal of more than 4300 digits cannot be read back
    if kind is list:
        return f"[{', '.join(map(to_literal, value))}]"
    if kind is tuple:
        return f"({', '.join(map(to_literal, value))}{',' if len(value) == 1 else ''})"
    if kind is dict:
        return "{" + ", ".join(f"{to_literal(key)}: {to_literal(item)}" for key, item in value.items()) + "}"
    if kind in (set, frozenset):
        inner = "{" + ", ".join(sorted(map(to_literal, value))) + "}"
        if kind is set:
            return inner if value else "set()"
        return f"frozenset({inner if value else ''})"
    raise ValueError(f"a {kind.__name__} has no literal: {value!r:.100}")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in _NAMES:
            return _NAMES[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            number = _number(operand)
            return -number if isinstance(sign, ast.USub) else number
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=ast.Constant(value=complex() as imaginary)):
            real = _number(left)
            return real + imaginary if isinstance(sign, ast.Add) else real - imaginary
        case ast.List(elts=items):
            return [_value(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(_value(item) for item in items)
        case ast.Set(elts=items):
            return {_value(item) for item in items}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_value(key): _value(item) for key, item in zip(keys, values, strict=True)}
        case ast.Call(func=ast.Name(id="set"), args=[], keywords=[]):
            return set()
        case ast.Call(func=ast.Name(id="frozenset"), args=arguments, keywords=[]) if len(arguments) < 2:
            return frozenset(*(_value(argument) for argument in arguments))
    raise ValueError(f"not a Python literal: {ast.unparse(node)[:100]!r}")


def _number(node: ast.expr) -> Any:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, int | float | complex):
        raise ValueError(f"not a Python literal: a sign before {value!r:.100}")
    return value
