"""Sections of text, tables and pictures as Markdown, and as one HTML page that holds its pictures and needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from megatron_antisd.reporting.tables import markdown_table

MAX_PHONE_PIXELS = 1200
TEMPLATE = Path(__file__).parent / "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text. The first column is read as the row's name."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Under one heading: paragraphs, then a table, then a picture, then notes."""

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    picture: Path | None = None
    """A PNG in the directory of the report."""
    alternative: str = ""
    """What the picture shows, for who cannot see it."""
    notes: tuple[str, ...] = ()


def markdown_page(title: str, sections: Sequence[Section]) -> str:
    """The sections as Markdown; pictures are links to files beside it."""
    parts = [f"# {title}"]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        if section.table is not None:
            parts.append(markdown_table(section.table.header, section.table.rows))
        if section.picture is not None:
            parts.append(f"![{section.alternative}]({section.picture.name})")
        parts += section.notes
    return "\n\n".join(parts) + "\n"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """The sections as one HTML page with the pictures inside. Every text is escaped: names of runs and models are anyone's."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    pictures = {section.picture: _picture(section.picture) for section in sections if section.picture is not None}
    return environment.from_string(TEMPLATE.read_text()).render(title=title, sections=sections, pictures=pictures)


def _picture(path: Path) -> dict[str, str | bool]:
    """The picture as a data URI, and whether it is too broad for a phone's width: the page then lets it scroll sideways."""
    content = path.read_bytes()
    return {"uri": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
            "broad": int.from_bytes(content[16:20], "big") > MAX_PHONE_PIXELS}  # fmt: skip
