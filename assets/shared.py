"""What the assets of a recipe share: their names, their rounds, and which recipe a run uses."""

import json
from typing import Any

import dagster as dg

from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError

OVERRIDES = "rsft/set"  # run tag: JSON of `a.b` → YAML text, as given to `rsft run --set`


def rounds_of(recipe: Recipe) -> dg.DynamicPartitionsDefinition:
    """The recipe's rounds, as partitions."""
    return dg.DynamicPartitionsDefinition(name=f"{recipe.name}_rounds")


def key(recipe: Recipe, name: str) -> dg.AssetKey:
    return dg.AssetKey([recipe.name, name])


def declared(recipe: Recipe, *, kinds: set[str], reads: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """The arguments with which every asset of a recipe is declared."""
    return {
        "key_prefix": [recipe.name],
        "group_name": recipe.name,
        "owners": recipe.owners,
        "kinds": kinds,
        "tags": {"rsft/recipe": recipe.name, "rsft/task": recipe.task},
        "deps": [key(recipe, name) for name in reads],
        "pool": recipe.name,  # dagster.yaml allows one run per pool at a time
        **more,
    }


def overrides(run: dg.DagsterRun) -> dict[str, str]:
    """What a run overrides: path → value as YAML text. Raises RecipeError if its tag does not say."""
    text = run.tags.get(OVERRIDES, "{}")
    try:
        given = json.loads(text).items()
    except (ValueError, AttributeError):
        raise RecipeError(f"the tag {OVERRIDES} is {text!r}; expected a JSON object of a.b → value") from None
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in given}


def as_run(recipe: Recipe, context: dg.AssetExecutionContext) -> Recipe:
    """The recipe as its file is now, with this run's overrides."""
    return load(recipe.file, overrides(context.run))


def as_file(recipe: Recipe) -> Recipe:
    """The recipe as its file is now."""
    return load(recipe.file)
