"""The job of a recipe: one round, from prompts to evaluation, in one process."""

import dagster as dg

from assets.shared import rounds_of
from rsft_pipeline import rounds
from rsft_pipeline.recipe.recipe import Recipe

LOOP = "rsft/loop"  # run tag whose value is the recipe; dagster.yaml allows one run per value at a time


def job_name(recipe: Recipe) -> str:
    return f"{recipe.name}_round"


def round_job(recipe: Recipe):
    """Materialise every asset of a round, checks included.

    In one process: a chain of steps gains nothing from separate processes, and would lose seconds on imports.
    """
    return dg.define_asset_job(
        job_name(recipe),
        selection=dg.AssetSelection.groups(recipe.name),
        partitions_def=rounds_of(recipe),
        executor_def=dg.in_process_executor,
        hooks={mark_failed},
        tags={LOOP: recipe.name},
        description=f"One round of {recipe.name}: {recipe.description}",
    )


@dg.failure_hook(required_resource_keys={"store", "tracking"})
def mark_failed(context: dg.HookContext) -> None:
    """Record in MLflow too that the round failed."""
    tags = context.instance.get_run_by_id(context.run_id).tags
    with context.resources.store.open() as lake:
        row = rounds.row_of(lake, tags[LOOP], tags["dagster/partition"])
    revoked_before = row and row["state"] == "revoked" and row["dagster_run_id"] != context.run_id
    if row and row["state"] != "finished" and not revoked_before:
        context.resources.tracking.end(row["mlflow_run_id"], "FAILED")
