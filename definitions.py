"""What Dagster loads: the assets, checks, job, sensors and schedule of every recipe, and the resources.

A broken recipe is left out and named in the log, so that the others go on running.
"""

import logging
import os
from collections.abc import Iterable
from typing import Any

import dagster as dg

from assets.accepted import accepted
from assets.candidates import candidates
from assets.checkpoint import checkpoint
from assets.checks import checks
from assets.controls import controls
from assets.evaluation import evaluation
from assets.policy import policy
from assets.prompts import prompts
from assets.scores import scores
from automation.jobs import round_job
from automation.schedules import schedules
from automation.sensors import sensors
from resources.accelerator import Accelerator
from resources.sampler import TransformersSampler
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline.environment import settle_environment
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.reading import RECIPES, load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError

log = logging.getLogger(__name__)


def build(recipes: Iterable[Recipe], **resources: Any) -> dg.Definitions:
    """The definitions of these recipes; `resources` replace the usual ones of the same name."""
    parts: dict[str, list] = {"assets": [], "asset_checks": [], "jobs": [], "sensors": [], "schedules": []}
    for recipe in recipes:
        parts["assets"] += [
            make(recipe) for make in (prompts, policy, candidates, scores, accepted, checkpoint, evaluation)
        ]
        parts["assets"] += [controls(recipe)] if recipe.controls else []
        parts["asset_checks"] += checks(recipe)
        parts["jobs"].append(round_job(recipe))
        parts["sensors"] += sensors(recipe)
        parts["schedules"] += schedules(recipe)
    # In process, as in the round's job, also for assets that are materialised by hand.
    return dg.Definitions(**parts, resources={**usual_resources(), **resources}, executor=dg.in_process_executor)


def usual_resources() -> dict[str, Any]:
    """The resources as the environment configures them."""
    return {
        "store": StoreResource(catalog=os.environ.get("RSFT_CATALOG", ""), data=os.environ.get("RSFT_DATA", "")),
        "tracking": Tracking(uri=os.environ.get("RSFT_MLFLOW", "")),
        "accelerator": Accelerator(kind=os.environ.get("RSFT_DEVICE", "auto")),
        "sampler": TransformersSampler(),
    }


def readable_recipes() -> list[Recipe]:
    """The recipes in recipes/ and those that are linked into this home. Those that cannot be read are left out."""
    found = {}
    for folder in (Home.here().recipes, RECIPES):
        for file in sorted(folder.glob("*.yaml")):
            try:
                found[file.stem] = load(file)
            except RecipeError as error:
                log.error("left out: %s", error)
    return list(found.values())


def loadable(recipe: Recipe) -> bool:
    """Whether Dagster accepts a recipe: it judges `owners` and the cron line of `schedule`."""
    try:
        dg.Definitions.validate_loadable(build([recipe]))
    except dg.DagsterError as error:
        log.error("left out: %s: %s", recipe.file, error)
        return False
    return True


@dg.definitions
def defs() -> dg.Definitions:
    """All readable recipes. They are checked together, because every process of Dagster loads them, and one by one only
    if one of them is refused."""
    settle_environment()
    recipes = readable_recipes()
    try:
        together = build(recipes)
        dg.Definitions.validate_loadable(together)
        return together
    except dg.DagsterError:
        return build(filter(loadable, recipes))
