"""Here: what commands work on in this home: its store, its Dagster instance, MLflow, the device, and recipes by name.

Not: a command's arguments, nor what it prints.
"""

import logging
import os
from pathlib import Path

from rsft_pipeline.audit.revoke import Revoked
from rsft_pipeline.devices import Device
from rsft_pipeline.home import ROOT, Home
from rsft_pipeline.recipe import reading
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.store import Store

UNCAPTURED = {
    "compute_logs": {
        "module": "dagster._core.storage.noop_compute_log_manager",
        "class": "NoOpComputeLogManager",
        "config": {},
    }
}


def store() -> Store:
    return _resource("store").open()


def instance():
    """The home's DagsterInstance, made where it is missing: processes that find none take turns.

    What steps print stays in the terminal: the processes by which Dagster would copy it to its pages get a Ctrl-C too,
    and each answers with a traceback.
    """
    import dagster as dg
    from dagster._core.instance.ref import InstanceRef

    home = Home.here()
    settings = home.dagster / "dagster.yaml"
    os.environ["DAGSTER_HOME"] = str(home.dagster)
    logging.getLogger("dagster").setLevel(logging.WARNING)
    with home.lock("instance", wait=True):
        if not settings.exists() or not settings.stat().st_size:
            made = settings.with_suffix(".new")  # a whole file or none, whatever happens meanwhile
            made.write_text((ROOT / "dagster.yaml").read_text())
            made.replace(settings)
        return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home.dagster), overrides=UNCAPTURED))


def tracking():
    return _resource("tracking")


def accelerator():
    return _resource("accelerator")


def device() -> Device:
    """What models run on. Raises RecipeError where RSFT_DEVICE names none."""
    try:
        return accelerator().device()
    except ValueError as error:
        raise RecipeError(f"RSFT_DEVICE: {error}") from error


def recipe_name(typed: str) -> str:
    """What a recipe is called that is given by its name or path."""
    return Path(typed).stem if typed.endswith(".yaml") else typed


def recipe_file(name: str) -> Path:
    """The file of a recipe, by its name or path. Raises RecipeError, naming those that are near."""
    return reading.find(name, (reading.RECIPES, Home.here().recipes))


def tell(dagster, store: Store, done: Revoked) -> None:
    """Let Dagster and MLflow show a revocation."""
    from assets import outside

    outside.tell(dagster, tracking(), store, done)


def _resource(name: str):
    from definitions import usual_resources

    return usual_resources()[name]
