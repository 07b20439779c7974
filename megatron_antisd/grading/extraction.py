"""The program in a response: its last fenced block of code."""

from __future__ import annotations

import re

from megatron_antisd.grading.boxes import THINKING_END

MAX_FENCE_CHARACTERS = 1000
"""Of a line that opens or closes a block."""
MAX_NESTED = 4
"""Markdown blocks inside of Markdown blocks that are looked into."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_FENCE = re.compile(r"([ \t]*)(`{3,}(?!`)|~{3,}(?!~))([^`]*)")  # each part ends where the next begins: linear in the line's length
_PYTHON = {"python", "python3", "py", "py3", "python2"}
_WRAPPERS = {"markdown", "md"}


def extract_program(response: str) -> str | None:
    """The last block fenced as Python, else the last fenced block; None where there is no fence with anything in it.

    Only the text after the last `</think>` counts. A fence may be longer than three marks, indented, of tildes, or never closed. Text
    without a fence is never taken for a program, even where it would parse: that would reward answers by accident.
    """
    blocks = _blocks(response.rpartition(THINKING_END)[2], MAX_NESTED)
    python = [code for language, code in blocks if language in _PYTHON]
    chosen = (python or [code for _, code in blocks] or [None])[-1]
    return chosen


def split_lines(text: str) -> list[str]:
    """At ends of lines alone: `str.splitlines` also splits at form feeds and U+2028, which may stand inside of a program's strings."""
    lines = _LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def _blocks(text: str, nested: int) -> list[tuple[str, str]]:
    """(language, code) of every fenced block that is not blank, in order; those inside of a Markdown block in its place, `nested` deep."""
    found: list[tuple[str, str]] = []
    opened: tuple[int, str, str] | None = None  # indentation, fence, language
    lines: list[str] = []

    def close() -> None:
        code = "\n".join(lines)
        language = opened[2]
        inner = _blocks(code, nested - 1) if language in _WRAPPERS and nested else []
        found.extend(inner or ([(language, code)] if code.strip() else []))
        lines.clear()

    for line in split_lines(text):
        fence = _FENCE.fullmatch(line) if len(line) <= MAX_FENCE_CHARACTERS else None
        indent, marks, language = (len(fence[1]), fence[2], fence[3].strip().partition(" ")[0].lower()) if fence else (0, "", "")
        language = language.strip("{}.")
        if opened is None:
            if fence:
                opened = indent, marks, language
        elif fence and marks[0] == opened[1][0] and len(marks) >= len(opened[1]):
            close()
            # A fence with a language inside of an open block begins the next one: the first was never closed.
            opened = (indent, marks, language) if language else None
        else:
            lines.append(_outdented(line, opened[0]))
    if opened is not None:
        close()
    return found


def _outdented(line: str, indent: int) -> str:
    return line[indent:] if not line[:indent].strip() else line.lstrip()
