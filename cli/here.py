"""Here: what commands work with: this home's store, Dagster instance and MLflow, the device, and recipes by name.

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
    """The home's DagsterInstance, made if it is missing; a lock keeps two processes from making it at once.

    What steps print stays in the terminal. The processes with which Dagster would copy it to its pages also receive
    a Ctrl-C, and each would print a traceback.
    """
    import dagster as dg
    from dagster._core.instance.ref import InstanceRef

    home = Home.here()
    settings = home.dagster / "dagster.yaml"
    os.environ["DAGSTER_HOME"] = str(home.dagster)
    logging.getLogger("dagster").setLevel(logging.WARNING)
    with home.lock("instance", wait=True):
        if not settings.exists() or not settings.stat().st_size:
            made = settings.with_suffix(".new")  # renamed when complete, so that no part of a file is ever there
            made.write_text((ROOT / "dagster.yaml").read_text())
            made.replace(settings)
        return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home.dagster), overrides=UNCAPTURED))


def tracking():
    return _resource("tracking")


def accelerator():
    return _resource("accelerator")


def device() -> Device:
    """The device that models run on. Raises RecipeError if RSFT_DEVICE names one that does not exist."""
    try:
        return accelerator().device()
    except ValueError as error:
        raise RecipeError(f"RSFT_DEVICE: {error}") from error


def recipe_name(typed: str) -> str:
    """The name of a recipe that was typed as a name or a path."""
    return Path(typed).stem if typed.endswith(".yaml") else typed


def recipe_file(name: str) -> Path:
    """The file of a recipe, by name or path. Raises RecipeError if there is none, naming similar ones."""
    return reading.find(name, (reading.RECIPES, Home.here().recipes))


def tell(dagster, store: Store, done: Revoked) -> None:
    """Mark a revocation in Dagster and MLflow."""
    from assets import outside

    outside.tell(dagster, tracking(), store, done)


def _resource(name: str):
    from definitions import usual_resources

    return usual_resources()[name]
