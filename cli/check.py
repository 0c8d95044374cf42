"""`rsft check`, `schema`: what a recipe may say, and whether one can run. And how commands are given a recipe.

Not: running it (run.py).
"""

import json
import shlex
from collections.abc import Mapping
from typing import Annotated

import typer

from cli import here
from cli.console import say
from rsft_pipeline import models, prompts, scoring
from rsft_pipeline.home import Home
from rsft_pipeline.recipe import reading
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name in recipes/, or a path to a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a field of the recipe; may be repeated."),
]


def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check whether a recipe can run: its fields, and the files and models that they name. Runs nothing."""
    loaded = checked(reading.load(here.recipe_file(recipe), overrides_of(set_)))
    say(f"{loaded.file}: {loaded.name} can run (digest {loaded.digest})")
    named = dict.fromkeys([*models.on_hub(loaded), *scoring.on_hub(loaded)])
    hub = [f"{name}, which is no folder here and is taken for a model on the hub" for name in named]
    rows = "the rows of the source behind the first good one, and whether a prompt fits into the model's context"
    for one in (*hub, rows):
        say(f"  left to the round: {one}")


def schema() -> None:
    """JSON Schema of recipes, for editors that complete and check YAML."""
    print(json.dumps(reading.schema(), indent=2))


def overrides_of(given: list[str] | None) -> dict[str, str]:
    """What `--set` was given: path → value as YAML text. Raises RecipeError."""
    found = {}
    for one in given or []:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {one}: expected a.b=value")
        found[key] = value
    return found


def command(recipe: str, overrides: Mapping[str, str], rounds: int | None = None) -> str:
    """What to type to run a recipe so."""
    given = [word for path, text in overrides.items() for word in ("--set", f"{path}={text}")]
    number = [] if rounds is None else ["--rounds", str(rounds)]
    return shlex.join(["rsft", "run", recipe, *number, *given])


def checked(recipe: Recipe) -> Recipe:
    """The recipe, once what it names is seen to be there: nothing has run by then."""
    import dagster as dg

    from definitions import build

    try:
        _check_name(recipe)
        prompts.check(recipe)
        scoring.check(recipe)
        prompts.check_room(recipe, models.check(recipe))
        dg.Definitions.validate_loadable(build([recipe]))
    except dg.DagsterError as error:  # of a recipe that was read these are all that it judges
        raise RecipeError(f"{recipe.file}: `schedule` or `owners`: {error}") from error
    except (ValueError, models.ModelError) as error:
        raise RecipeError(f"{recipe.file}: {error}") from error
    return recipe


def _check_name(recipe: Recipe) -> None:
    """See that no other recipe has the recipe's name, by which this home keeps its rounds."""
    for folder in (reading.RECIPES, Home.here().recipes):
        other = folder / recipe.file.name
        if other.exists() and other.resolve() != recipe.file:
            raise RecipeError(f"a recipe called {recipe.name!r} is already {other.resolve()}; rename this file")
