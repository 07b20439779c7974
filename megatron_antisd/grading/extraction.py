"""The program in a response: its last fenced block of code."""

from __future__ import annotations

import re

THINKING_END = "</think>"
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[ \t]*([^\n`]*)$")
_PYTHON = {"python", "python3", "py", "py3", "python2"}
_WRAPPERS = {"markdown", "md"}


def extract_program(response: str) -> str | None:
    """The last block fenced as Python, else the last fenced block; None where there is no fence with anything in it.

    Only the text after the last `</think>` counts. A fence may be longer than three marks, indented, of tildes, or never closed. Text
    without a fence is never taken for a program, even where it would parse: that would reward answers by accident.
    """
    blocks = list(_blocks(response.rpartition(THINKING_END)[2]))
    python = [code for language, code in blocks if language in _PYTHON]
    chosen = (python or [code for _, code in blocks] or [None])[-1]
    return chosen


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block that is not blank, in order; those inside of a Markdown block in its place."""
    found: list[tuple[str, str]] = []
    opened: tuple[int, str, str] | None = None  # indentation, fence, language
    lines: list[str] = []

    def close() -> None:
        code = "\n".join(lines)
        language = opened[2]
        inner = _blocks(code) if language in _WRAPPERS else []
        found.extend(inner or ([(language, code)] if code.strip() else []))
        lines.clear()

    for line in text.splitlines():
        fence = _FENCE.match(line)
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
