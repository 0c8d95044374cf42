"""Sensors: what starts the next round by itself.

They look at what exists, never at what just happened, so a missed or repeated tick changes nothing.
Both are off until somebody turns them on.
"""

import dagster as dg

from assets.shared import as_file, rounds_of
from automation.jobs import job_name
from automation.runs import busy, due, failures
from resources.store import StoreResource
from rsft_pipeline import lineage, rounds
from rsft_pipeline.prompts import inbox_files
from rsft_pipeline.recipe.recipe import Recipe

ATTEMPTS = 3  # at a round, before a person has to look


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
            there = None if isinstance(round_key, dg.SkipReason) else rounds.raw(lake, now.name, round_key)
        if isinstance(round_key, dg.SkipReason):
            return round_key
        failed = failures(context.instance, now, round_key)
        if failed >= ATTEMPTS:
            return _look(round_key, failed)
        # A revoked round was asked for before: Dagster would take the same key for the same request.
        instead = f" instead of {there['dagster_run_id']}" if there and there["state"] == "revoked" else ""
        return _request(now, round_key, f"{round_key} attempt {failed + 1}{instead}")

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
        inbox, files = now.path(now.prompts.inbox), inbox_files(now)
        nothing = dg.SkipReason(f"nothing new in {inbox}")
        if not files:
            return nothing
        seen = lineage.digest([[file.name, lineage.file_digest(file)] for file in files])
        with store.open() as lake:
            round_key = rounds.following(lake, now.name)
        asked, _, waiting = (context.cursor or "").partition(" ")
        again = seen == asked and round_key == waiting  # the round that was to read them is not finished
        if seen == asked and not again:
            return nothing
        if busy(context.instance, now):
            return dg.SkipReason(f"new files in {inbox}, but a round of {now.name} is under way")
        failed = failures(context.instance, now, round_key)
        if again and failed >= ATTEMPTS:
            return _look(round_key, failed)
        result = _request(now, round_key, f"{round_key} {seen} attempt {failed + 1}")
        return result._replace(cursor=f"{seen} {round_key}")

    return new_prompts


def _look(round_key: str, failed: int) -> dg.SkipReason:
    return dg.SkipReason(f"{round_key} failed {failed} times: look at its runs, then launch it by hand")


def _request(recipe: Recipe, round_key: str, run_key: str) -> dg.SensorResult:
    return dg.SensorResult(
        dynamic_partitions_requests=[rounds_of(recipe).build_add_request([round_key])],
        run_requests=[dg.RunRequest(run_key=run_key, partition_key=round_key)],
    )
