"""`rsft audit`: questions about what was done, on the command line.

Belongs here: arguments, and how an answer is shown. Not: the answers (rsft_pipeline/audit), but for what
Dagster and MLflow have to add to one.

Every command reads the store of `$RSFT_HOME` and is safe while rounds run; only `revoke` writes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from cli.run import _find, _store
from rsft_pipeline import recipe as recipes
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.ids import recipes as recipes_in
from rsft_pipeline.home import Home
from rsft_pipeline.recipe import Recipe
from rsft_pipeline.store import Store

app = typer.Typer(help="Ask what was done: trace, impact, revoke, verify, replay, compare.", no_args_is_help=True)
console = Console()

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Look in this recipe only; default: in all.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object, and nothing else.")]


@contextmanager
def opened() -> Iterator[Store]:
    """The store of this home. Looking makes none: raises AuditError where nothing has run."""
    with _store() as store:
        if not recipes_in(store):
            raise AuditError(f"no round has run in {Home.here().path} yet: there is nothing to ask about")
        yield store


def recipe_named(name: str) -> Recipe:
    """The recipe as its file is now; `rounds.record` gives it as a round recorded it."""
    return recipes.load(_find(name))


def show(answer: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print an answer (a dataclass, or what json.dumps takes): as JSON, or as `render` draws it."""
    if as_json:
        print(json.dumps(asdict(answer) if hasattr(answer, "__dataclass_fields__") else answer, default=_plain))
    else:
        console.print(render(answer), highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    """What JSON has no form for: paths and times as text, bytes as UTF-8 with what is none of it replaced."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
