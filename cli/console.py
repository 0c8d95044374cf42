"""Console: how commands print for people, and the option `--json`.

On a terminal lines are wrapped to its width; without one they are not.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console

WHOLE = 1_000_000  # columns, more than any line has; rich does not pad lines to this width

console = Console(width=None if sys.stdout and sys.stdout.isatty() else WHOLE)  # stdout is None if it was closed


def _aside(as_json: bool) -> bool:
    """With `--json`, print what is for people to standard error."""
    console.stderr = as_json
    return as_json


JsonOption = Annotated[
    bool,
    typer.Option("--json", callback=_aside, help="Print JSON, and nothing else, to standard output."),
]


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is: without markup, and never cut."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
