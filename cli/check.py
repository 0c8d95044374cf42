"""`rsft check` and `rsft schema`: whether a recipe can run, and what one may contain. Also: how commands take a recipe.

Not: running one (run.py).
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

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, or the path of a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a field of the recipe. May be given several times."),
]


def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check whether a recipe can run: its fields, and the files and local models that they name. Runs no round."""
    loaded = checked(reading.load(here.recipe_file(recipe), overrides_of(set_)))
    say(f"{loaded.file}: {loaded.name} can run (digest {loaded.digest})")
    named = dict.fromkeys([*models.on_hub(loaded), *scoring.on_hub(loaded)])
    hub = [f"{name}, which is not a folder here and is taken for a model on the hub" for name in named]
    rows = "the rows of the source that this check did not read, and whether prompts fit into the model's context"
    for one in (*hub, rows):
        say(f"  checked only when a round runs: {one}")


def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML."""
    print(json.dumps(reading.schema(), indent=2))


def overrides_of(given: list[str] | None) -> dict[str, str]:
    """What was given with `--set`: path → value as YAML text. Raises RecipeError if it has another form."""
    found = {}
    for one in given or []:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {one}: expected a.b=value")
        found[key] = value
    return found


def command(recipe: str, overrides: Mapping[str, str], rounds: int | None = None) -> str:
    """The command that runs a recipe with these overrides."""
    given = [word for path, text in overrides.items() for word in ("--set", f"{path}={text}")]
    number = [] if rounds is None else ["--rounds", str(rounds)]
    return shlex.join(["rsft", "run", recipe, *number, *given])


def checked(recipe: Recipe) -> Recipe:
    """The recipe itself, after checking that it can run. Raises RecipeError if not."""
    import dagster as dg

    from definitions import build

    try:
        _check_name(recipe)
        prompts.check(recipe)
        scoring.check(recipe)
        prompts.check_room(recipe, models.check(recipe))
        dg.Definitions.validate_loadable(build([recipe]))
    except dg.DagsterError as error:  # Dagster judges only these two fields
        raise RecipeError(f"{recipe.file}: `schedule` or `owners`: {error}") from error
    except (ValueError, models.ModelError) as error:
        raise RecipeError(f"{recipe.file}: {error}") from error
    return recipe


def _check_name(recipe: Recipe) -> None:
    """Raise RecipeError if another recipe has this name, under which the home keeps its rounds."""
    for folder in (reading.RECIPES, Home.here().recipes):
        other = folder / recipe.file.name
        if other.exists() and other.resolve() != recipe.file:
            raise RecipeError(f"a recipe called {recipe.name!r} is already {other.resolve()}; rename this file")
