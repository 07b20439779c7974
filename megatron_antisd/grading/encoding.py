"""Values on their way out of a sandbox: JSON text that holds plain Python values and nothing that runs.

`encode` works where untrusted code ran, `decode` where it must not: whatever bytes arrive, `decode` gives plain values or raises
ValueError. The sandbox loads this file too, so it imports nothing that is slow to load; `json` is left to the reading side.
"""

from __future__ import annotations

from _json import encode_basestring_ascii as quote

if False:  # for readers of the types alone: the sandbox starts faster without
    from collections.abc import Iterable

TOO_LARGE = "value that is too large"
MAX_DEPTH = 100
MAX_NODES = 500_000
MAX_CHARACTERS = 4 << 20
MAX_COLLISIONS = 64
"""Values with one hash in a set or among the keys of a dict. Chance gives 2; thousands, which a program can choose, cost the square."""
_SMALL_INTEGER = 1 << 63


class NotComparableError(Exception):
    """A value that no test can compare; the message says why."""


class Opaque:
    """Stands for a value that came back but cannot be compared: equal to nothing, yet not None."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: object) -> str:
    """JSON of None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict, nested; subclasses count as their base.

    Anything else, or more than the limits above, becomes the text of an `Opaque`.
    """
    parts: list[str] = []
    try:
        _write(value, parts, [MAX_NODES, MAX_CHARACTERS], MAX_DEPTH)
    except NotComparableError as reason:
        return f'["x",{quote(str(reason)[:100])}]'
    return "".join(parts)


def decode(tree: object) -> object:
    """The value of what `json.loads` made of an encoded text, in time proportional to its size.

    Raises ValueError for anything that `encode` does not write, its limits included, and for sets built of colliding hashes.
    """
    if type(tree) is list and len(tree) == 2 and tree[0] == "x" and type(tree[1]) is str:
        return Opaque(tree[1])
    try:
        return _plain(tree, [MAX_NODES, MAX_CHARACTERS], MAX_DEPTH)
    except (TypeError, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"no encoded value: {type(error).__name__}") from error


def distinct(values: Iterable[object]) -> list[object]:
    """The different ones, as a set would keep them. Raises ValueError where more than MAX_COLLISIONS have one hash."""
    found: dict[int, list[object]] = {}
    for value in values:
        alike = found.setdefault(hash(value), [])
        if value in alike:
            continue
        if len(alike) == MAX_COLLISIONS:
            raise ValueError("colliding hashes")
        alike.append(value)
    return [value for alike in found.values() for value in alike]


def _plain(tree: object, left: list[int], depth: int) -> object:
    left[0] -= 1
    left[1] -= len(tree) if type(tree) is str else 0
    if left[0] < 0 or left[1] < 0 or depth < 0:
        raise ValueError(TOO_LARGE)
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is not list:
        raise TypeError(f"a {type(tree).__name__} for a list")
    kind, *rest = tree
    if kind in _SCALARS:
        left[1] -= len(rest[0]) if kind != "c" else 0
        return _SCALARS[kind](*rest)
    items = [_plain(item, left, depth - 1) for item in rest]
    if kind == "d":
        distinct(items[::2])
        return dict(zip(items[::2], items[1::2], strict=True))
    return _COLLECTIONS[kind](distinct(items) if kind in "sf" else items)


_SCALARS = {
    "i": lambda digits: int(digits, 16),
    "c": lambda real, imaginary: complex(real, imaginary),
    "b": lambda digits: bytes.fromhex(digits),
}
_COLLECTIONS = {"l": list, "t": tuple, "s": set, "f": frozenset}


def _write(value: object, parts: list[str], left: list[int], depth: int) -> None:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise NotComparableError(TOO_LARGE if depth >= 0 else "value nested too deeply")
    kind = type(value)
    if value is None:
        text = "null"
    elif kind is bool:
        text = "true" if value else "false"
    elif issubclass(kind, int):
        number = int.__int__(value)  # the base's own method: a subclass may lie
        text = str(number) if -_SMALL_INTEGER < number < _SMALL_INTEGER else f'["i","{number:x}"]'
    elif issubclass(kind, float):
        text = _float(float.__float__(value))
    elif issubclass(kind, str):
        text = quote(str.__str__(value))
    elif issubclass(kind, (list, tuple, set, frozenset, dict)):
        _write_collection(value, parts, left, depth)
        return
    else:
        text = _rare(value, kind)
    left[1] -= len(text) + 1
    if left[1] < 0:
        raise NotComparableError(TOO_LARGE)
    parts.append(text)


def _float(value: float) -> str:
    if value != value:
        return "NaN"
    return float.__repr__(value) if value not in (_INFINITY, -_INFINITY) else ("Infinity" if value > 0 else "-Infinity")


_INFINITY = float("inf")


def _rare(value: object, kind: type) -> str:
    if issubclass(kind, complex):
        plain = complex.__pos__(value)
        return f'["c",{_float(plain.real)},{_float(plain.imag)}]'
    if issubclass(kind, (bytes, bytearray)):
        return f'["b","{bytes(value).hex()}"]'
    if str(getattr(kind, "__module__", "")).partition(".")[0] == "numpy" and hasattr(kind, "item") and getattr(value, "shape", None) == ():
        return encode(value.item())  # a NumPy scalar equals the Python number that it holds
    raise NotComparableError(str(getattr(kind, "__name__", "value")))


def _write_collection(value: object, parts: list[str], left: list[int], depth: int) -> None:
    kind = type(value)
    base, letter = next((base, letter) for base, letter in _LETTERS if issubclass(kind, base))
    parts.append(f'["{letter}"')
    if base is dict:
        items = [part for pair in dict.items(value) for part in pair]
    else:
        items = base.__iter__(value)
    for item in items:
        parts.append(",")
        _write(item, parts, left, depth - 1)
    parts.append("]")


_LETTERS = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f"), (dict, "d"))
