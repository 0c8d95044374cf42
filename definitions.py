"""What Dagster loads: for every recipe its assets, checks, job, sensors and schedule, with the resources.

Nothing else belongs here. A recipe that is broken is left out and named in the log, so that the
others go on running; `rsft check` says what is wrong with it.
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
    """The definitions of some recipes; `resources` replace the usual ones."""
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
    # In process for assets materialised by hand too, as in the round's job.
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
    """The recipes of this repository and those that have run in this home, but for broken ones."""
    found = {}
    for folder in (Home.here().recipes, RECIPES):
        for file in sorted(folder.glob("*.yaml")):
            try:
                found[file.stem] = load(file)
            except RecipeError as error:
                log.error("left out: %s", error)
    return list(found.values())


def loadable(recipe: Recipe) -> bool:
    """Whether Dagster takes a recipe: owners and cron lines are its to judge."""
    try:
        dg.Definitions.validate_loadable(build([recipe]))
    except dg.DagsterError as error:
        log.error("left out: %s: %s", recipe.file, error)
        return False
    return True


@dg.definitions
def defs() -> dg.Definitions:
    """All recipes at once, as every process of Dagster's loads them; one by one only where one of them is refused."""
    settle_environment()
    recipes = readable_recipes()
    try:
        together = build(recipes)
        dg.Definitions.validate_loadable(together)
        return together
    except dg.DagsterError:
        return build(filter(loadable, recipes))
