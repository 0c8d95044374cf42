"""Runs: which round of a recipe is due, and whether one is in progress in Dagster, not counting killed ones."""

import dagster as dg

from automation.jobs import LOOP
from resources import process
from rsft_pipeline import rounds
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.store import Store

ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def due(store: Store, instance: dg.DagsterInstance, recipe: Recipe) -> str | dg.SkipReason:
    """The round to start now, or why none is due."""
    if reason := rounds.why_stop(store, recipe):
        return dg.SkipReason(f"stopped: {reason}")
    if busy(instance, recipe):
        return dg.SkipReason(f"a round of {recipe.name} is under way")
    return rounds.following(store, recipe.name)


def busy(instance: dg.DagsterInstance, recipe: Recipe) -> bool:
    """Whether a round of the recipe is queued or running."""
    return any(recipe.name in _of(run) for run in under_way(instance))


def under_way(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs of any recipe that are queued or running.

    A run whose process was killed stays «started» in Dagster's records: it is reported as failed here.
    """
    alive = []
    for run in instance.get_runs(dg.RunsFilter(statuses=ACTIVE)):
        if process.gone(run.tags.get(process.TAG), run.run_id):
            instance.report_run_failed(run, f"the process of this run is gone: {run.tags[process.TAG]}")
        else:
            alive.append(run)
    return alive


def failed(instance: dg.DagsterInstance, recipe: str, round_key: str) -> list[dg.DagsterRun]:
    """Runs of a round that failed or were cancelled since one last succeeded, the latest first."""
    tags = _tags(recipe, round_key)
    succeeded = dg.RunsFilter(tags=tags, statuses=[dg.DagsterRunStatus.SUCCESS])
    last = next((record.create_timestamp for record in instance.get_run_records(succeeded, limit=1)), None)
    ended = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    return list(instance.get_runs(dg.RunsFilter(tags=tags, statuses=ended, created_after=last)))


def last(instance: dg.DagsterInstance, recipe: str, round_key: str) -> dg.DagsterRun | None:
    """The last run of a round's job, whatever its outcome."""
    return next(iter(instance.get_runs(dg.RunsFilter(tags=_tags(recipe, round_key)), limit=1)), None)


def _tags(recipe: str, round_key: str) -> dict[str, str]:
    """The tags by which the runs of a round's job are found."""
    return {LOOP: recipe, "dagster/partition": round_key}


def _of(run: dg.DagsterRun) -> set[str]:
    """The recipes that a run belongs to, even if it materialised assets without a job."""
    job = run.tags.get(LOOP)
    return {job} if job else {asset.path[0] for asset in run.asset_selection or ()}
