"""Console: where commands print for people, and the option that has JSON printed instead.

As wide as the terminal; where there is none, lines stay whole.
"""

import sys
from typing import Annotated

import typer
from rich.console import Console

WHOLE = 1_000_000  # columns: more than any line has, and rich pads none to it

console = Console(width=None if sys.stdout and sys.stdout.isatty() else WHOLE)  # None: it was closed


def _aside(as_json: bool) -> bool:
    """Whoever reads the JSON has standard output for it alone."""
    console.stderr = as_json
    return as_json


JsonOption = Annotated[
    bool,
    typer.Option("--json", callback=_aside, help="Print one JSON object, and nothing else to standard output."),
]


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is: nothing in it is taken for markup, and it is as long as it is."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
