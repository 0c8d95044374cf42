"""Markdown: tables and pictures for people.

Text that a model wrote is data: it is folded to one line, truncated and escaped before it is put into Markdown.
"""

import base64
from collections.abc import Iterable, Mapping
from typing import Any

WIDTH = 160  # characters of a text shown in a table


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; every cell escaped."""
    rows = list(rows)
    if not rows:
        return "*none*"
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    printable = "".join(c if c.isprintable() else "␣" for c in " ".join(text.split()))
    cut = printable if len(printable) <= WIDTH else printable[: WIDTH - 1] + "…"
    return "".join(f"&#{ord(c)};" if c in "&<>|\\`*_{}[]()#!~.:@" else c for c in cut)


def picture(png: bytes, alternative: str) -> str:
    """A PNG embedded in Markdown, with no file of its own."""
    return f"![{alternative}](data:image/png;base64,{base64.b64encode(png).decode()})"
