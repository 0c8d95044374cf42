"""Sensors: what starts the next round automatically.

They look at what exists, never at what just happened, so a missed or repeated tick makes no difference.
Both are off until somebody turns them on.
"""

import functools
import json
from pathlib import Path
from typing import Any

import dagster as dg

from assets.shared import as_file, rounds_of
from automation.jobs import job_name
from automation.runs import busy, due, failed, last
from resources.store import StoreResource
from rsft_pipeline import lineage, rounds
from rsft_pipeline.prompts.sources import inbox_files
from rsft_pipeline.recipe.recipe import Recipe

ATTEMPTS = 3  # failed runs of a round before a person has to look


def sensors(recipe: Recipe) -> list[dg.SensorDefinition]:
    """The recipe's sensors."""
    return [_next_round(recipe), *([_new_prompts(recipe)] if recipe.prompts.inbox else [])]


def _next_round(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_next_round",
        job_name=job_name(recipe),
        minimum_interval_seconds=10,
        description="Starts the next round when the last one is finished, until a stop rule holds.",
    )
    def next_round(context: dg.SensorEvaluationContext, store: StoreResource):
        now = as_file(recipe)
        with store.open() as lake:
            round_key = due(lake, context.instance, now)
            if isinstance(round_key, dg.SkipReason):
                return round_key
            begun = rounds.row_of(lake, now.name, round_key)
        failures = failed(context.instance, now.name, round_key)
        if len(failures) >= ATTEMPTS:
            return _look(round_key, failures)
        return _request(now, round_key, _before(last(context.instance, now.name, round_key), begun))

    return next_round


def _new_prompts(recipe: Recipe) -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{recipe.name}_new_prompts",
        job_name=job_name(recipe),
        minimum_interval_seconds=30,
        description="Starts a round when files are dropped in the recipe's inbox, even where a stop rule holds.",
    )
    def new_prompts(context: dg.SensorEvaluationContext, store: StoreResource):
        now = as_file(recipe)
        if now.prompts.inbox is None:
            return dg.SkipReason("this recipe has no inbox any more")
        inbox = now.path(now.prompts.inbox)
        if not inbox.is_dir():
            return dg.SkipReason(f"there is no folder {inbox} yet")
        nothing = dg.SkipReason(f"nothing new in {inbox}")
        files = {lineage.digest([file.name, _content(file)]) for file in inbox_files(now)}
        if not files:
            return nothing
        requested, requested_round = _requested(context.cursor)
        with store.open() as lake:
            round_key = rounds.following(lake, now.name)
            begun = rounds.row_of(lake, now.name, round_key)
        known = files <= requested
        if known and round_key != requested_round:  # the round that was started for them is finished
            return nothing
        if busy(context.instance, now):
            return dg.SkipReason(f"new files in {inbox}, but a round of {now.name} is under way")
        failures = failed(context.instance, now.name, round_key)
        if known and len(failures) >= ATTEMPTS:
            return _look(round_key, failures)
        cursor = json.dumps({"files": sorted(files), "round": round_key})
        before = _before(last(context.instance, now.name, round_key), begun)
        return _request(now, round_key, lineage.digest(cursor), before)._replace(cursor=cursor)

    return new_prompts


def _content(file: Path) -> str:
    """The hash of a file's bytes or, if it cannot be read and the round will refuse it, the reason."""
    try:
        status = file.stat()
        return _hashed(file, status.st_size, status.st_mtime_ns)
    except OSError as error:
        return str(error.strerror)


@functools.lru_cache(maxsize=4096)
def _hashed(file: Path, size: int, changed: int) -> str:
    """Cached until the file changes: a sensor asks every half minute."""
    return lineage.file_digest(file)


def _requested(cursor: str | None) -> tuple[set[str], str | None]:
    """The files for which a round was requested last, and that round."""
    try:
        request = json.loads(cursor or "{}")
    except ValueError:  # written by an earlier version
        request = {}
    return set(request.get("files", ())), request.get("round")


def _before(tried: dg.DagsterRun | None, begun: dict[str, Any] | None) -> str:
    """The runs that last tried a round: its job's last run, whatever its outcome, and the run that began the round."""
    runs = dict.fromkeys([*([tried.run_id] if tried else []), *([begun["dagster_run_id"]] if begun else [])])
    return f"after {' '.join(runs)}" if runs else ""


def _look(round_key: str, failed: list[dg.DagsterRun]) -> dg.SkipReason:
    return dg.SkipReason(f"{round_key} failed {len(failed)} times: look at its runs, then launch it by hand")


def _request(recipe: Recipe, round_key: str, *why: str) -> dg.SensorResult:
    # Dagster does not start a second run with the same key.
    run_key = " ".join(filter(None, (round_key, *why)))
    return dg.SensorResult(
        dynamic_partitions_requests=[rounds_of(recipe).build_add_request([round_key])],
        run_requests=[dg.RunRequest(run_key=run_key, partition_key=round_key)],
    )
