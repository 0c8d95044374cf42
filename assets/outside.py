"""Outside: what Dagster and MLflow add to an audit, and telling them of a revocation.

Belongs here: looking up the run ids that the store keeps, and the marks that a revocation leaves in both. Not: the
audit's chain and the revocation itself (rsft_pipeline/audit), which need neither.
"""

from collections.abc import Iterable
from typing import Any

import dagster as dg

from resources.tracking import Tracking
from rsft_pipeline import rounds
from rsft_pipeline.audit.impact import Touched
from rsft_pipeline.audit.revoke import Revoked
from rsft_pipeline.steps import gates
from rsft_pipeline.store import Store


def registered(tracking: Tracking, recipe: str, checkpoints: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Checkpoint → its version in MLflow's registry, the aliases that name it, and the state of its run."""
    client, wanted, found = tracking.client(), set(checkpoints), {}
    for version in client.search_model_versions(f"name = '{recipe}'"):
        if (digest := version.tags.get("rsft.checkpoint")) in wanted:
            known = client.get_model_version(recipe, version.version)  # a search returns no aliases
            state = tracking.state(version.run_id) if version.run_id else None
            found[digest] = {"version": version.version, "aliases": list(known.aliases), "run": state}
    return found


def runs(instance: dg.DagsterInstance, wrote: Iterable[tuple[str | None, str]]) -> dict[str, dict[str, Any]]:
    """Dagster run → its job, state, and the materialisations of what it wrote (asset, partition, event).

    Args:
        wrote: pairs of a run, if it is known, and an asset that wrote something in it.
    """
    assets: dict[str, set[str]] = {}
    for run_id, asset in wrote:
        if run_id:
            assets.setdefault(run_id, set()).add(asset)
    found = {}
    for run_id, names in assets.items():
        run = instance.get_run_by_id(run_id)
        if run is None:
            continue
        found[run_id] = {"job": run.job_name, "state": run.status.value, "events": _events(instance, run, names)}
    return found


def _events(instance: dg.DagsterInstance, run: dg.DagsterRun, assets: set[str]) -> list[dict[str, Any]]:
    """A run's materialisations of these assets, with their storage ids, which `policy` records as `source_event`."""
    made = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION).records
    found = []
    for event in (record.event_log_entry.dagster_event for record in made):
        if event.asset_key.path[-1] not in assets:
            continue
        of = dg.AssetRecordsFilter(event.asset_key, asset_partitions=event.partition and [event.partition])
        records = instance.fetch_materializations(of, limit=100).records
        number = next((record.storage_id for record in records if record.run_id == run.run_id), None)
        found.append({"asset": event.asset_key.to_user_string(), "partition": event.partition, "event": number})
    return found


def tell(instance: dg.DagsterInstance, tracking: Tracking, store: Store, done: Revoked) -> None:
    """Mark what a revocation reached: in MLflow with tags, moving the alias `champion` back to the last champion
    that may be used; in Dagster with a failed check `nothing_revoked` of the checkpoints' assets.

    A text is named by its hash: it may have to be erased, and neither Dagster nor MLflow forgets.
    """
    by_recipe: dict[str, list[Touched]] = {}
    for touched in done.impact.checkpoints:
        by_recipe.setdefault(touched.recipe, []).append(touched)
    thing = done.impact.thing
    reason = f"{thing.kind} {thing.unspoken} was revoked by {done.who}: {done.why}"
    for recipe, reached in by_recipe.items():
        if _tag(tracking, recipe, {one.checkpoint: one for one in reached}, reason):
            tracking.set_champion(recipe, rounds.champion(store, recipe))
        named = {f"{one.round}, {one.role}": one.checkpoint for one in reached}
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey([recipe, "checkpoint"]),
                check_name=gates.nothing_revoked.__name__,
                passed=False,
                description=reason,
                metadata={"checkpoints": dg.MetadataValue.json(named)},
            )
        )


def _tag(tracking: Tracking, recipe: str, reached: dict[str, Touched], reason: str) -> bool:
    """Tag runs and registered versions. Returns whether any is registered."""
    client = tracking.client()
    for run in {one.mlflow_run_id for one in reached.values() if one.mlflow_run_id}:
        if tracking.state(run):
            tracking.tags(run, revoked=reason)
    versions = client.search_model_versions(f"name = '{recipe}'")
    for version in versions:
        if version.tags.get("rsft.checkpoint") in reached:
            client.set_model_version_tag(recipe, version.version, "rsft.revoked", reason)
    return bool(versions)
