"""Runs: which round of a recipe is due, and whether one is under way in Dagster, killed ones aside."""

import os
import socket

import dagster as dg
import psutil

from automation.jobs import LOOP
from rsft_pipeline import rounds
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.store import Store

PROCESS = "rsft/process"  # run tag: the process that a round started from the command line lives in
ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]


def this_process() -> str:
    """Names this process on this machine, also once its number has been given to another."""
    return f"{socket.gethostname()} {os.getpid()} {_begun(psutil.Process())}"


def _begun(process: psutil.Process) -> float:
    """Seconds from the start of the machine to that of the process, which no setting of the clock changes."""
    return process.create_time() - psutil.boot_time()


def due(store: Store, instance: dg.DagsterInstance, recipe: Recipe) -> str | dg.SkipReason:
    """The round to start now, or why none is."""
    if reason := rounds.why_stop(store, recipe):
        return dg.SkipReason(f"stopped: {reason}")
    if busy(instance, recipe):
        return dg.SkipReason(f"a round of {recipe.name} is under way")
    return rounds.following(store, recipe.name)


def busy(instance: dg.DagsterInstance, recipe: Recipe) -> bool:
    """Whether a round of the recipe is queued or running.

    A run whose process was killed stays «started» in Dagster's records, and keeps its place in the pool `gpu`:
    it is reported as failed here, and its place given back.
    """
    alive = []
    for run in instance.get_runs(dg.RunsFilter(statuses=ACTIVE)):  # of any recipe: they share the pool
        if _killed(run.tags.get(PROCESS)):
            instance.report_run_failed(run, f"the process of this run is gone: {run.tags[PROCESS]}")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        else:
            alive.append(run)
    return any(_of(run) == recipe.name for run in alive)


def failures(instance: dg.DagsterInstance, recipe: Recipe, round_key: str) -> int:
    """How often a round has failed or was cancelled."""
    ended = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    tags = {LOOP: recipe.name, "dagster/partition": round_key}
    return len(instance.get_runs(dg.RunsFilter(tags=tags, statuses=ended)))


def _of(run: dg.DagsterRun) -> str | None:
    """The recipe that a run belongs to, also where assets were materialised without its job."""
    return run.tags.get(LOOP) or next((asset.path[0] for asset in run.asset_selection or ()), None)


def _killed(process: str | None) -> bool:
    if process is None:
        return False  # started by Dagster's daemon, which watches its runs itself
    host, pid, created = process.split(" ")
    if host != socket.gethostname():
        return False
    try:
        return abs(_begun(psutil.Process(int(pid))) - float(created)) > 1
    except psutil.NoSuchProcess:
        return True
