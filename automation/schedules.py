"""Schedules: a round by the clock."""

import dagster as dg

from assets.shared import as_file, rounds_of
from automation.jobs import job_name
from automation.runs import due
from resources.store import StoreResource
from rsft_pipeline.recipe.recipe import Recipe


def schedules(recipe: Recipe) -> list[dg.ScheduleDefinition]:
    """The recipe's schedule, if it has one; off until somebody turns it on."""
    if recipe.schedule is None:
        return []

    @dg.schedule(
        name=f"{recipe.name}_schedule",
        job_name=job_name(recipe),
        cron_schedule=recipe.schedule,
        execution_timezone="UTC",
        description="Starts a round by the clock, unless one is under way or a stop rule holds.",
    )
    def by_the_clock(context: dg.ScheduleEvaluationContext, store: StoreResource):
        now = as_file(recipe)
        with store.open() as lake:
            round_key = due(lake, context.instance, now)
        if isinstance(round_key, dg.SkipReason):
            return round_key
        # Unlike a sensor, a schedule cannot request partitions in its result.
        context.instance.add_dynamic_partitions(rounds_of(recipe).name, [round_key])
        return dg.RunRequest(partition_key=round_key)

    return [by_the_clock]
