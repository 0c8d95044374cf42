"""The accepted set of a round: the decision on every candidate, with its reason."""

import dagster as dg

from assets.shared import declared, rounds_of
from resources import pages
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline import report, rounds
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps.decide import decide


def accepted(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(**declared(recipe, kinds={"duckdb"}, reads=("scores",), partitions_def=rounds_of(recipe)))
    def accepted(context: dg.AssetExecutionContext, store: StoreResource, tracking: Tracking) -> dg.MaterializeResult:
        """Which candidates are trained on, and why the others are not. Writes the table `decisions`."""
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            parameters = decide(lake, round_, context.run.run_id)
            facts = report.decisions(lake, round_)
        context.log.info("%d of %d candidates accepted", facts.accepted, facts.candidates)
        numbers = {"acceptance_rate": facts.rate, **facts.efficiency.metrics()}
        tracking.metrics(round_.mlflow_run_id, {f"accepted/{name}": value for name, value in numbers.items()})
        return dg.MaterializeResult(
            data_version=dg.DataVersion(facts.digest),
            metadata={
                "dagster/partition_row_count": facts.accepted,
                "accepted": facts.accepted,
                "acceptance_rate": facts.rate,
                "distinct_accepted": facts.distinct,
                "prompts_with_accepted": facts.prompts,
                "reasons": dg.MetadataValue.md(facts.reasons),
                "examples": dg.MetadataValue.md(facts.examples),
                "efficiency": dg.MetadataValue.md(facts.efficiency_table),
                **({"coverage": dg.MetadataValue.md(facts.coverage_table)} if facts.coverage_table else {}),
                "rule": dg.MetadataValue.json(parameters),
                **{name: value for name, value in numbers.items() if value is not None},
                "audit": dg.MetadataValue.url(pages.audit(pages.round_(recipe.name, round_.key))),
            },
        )

    return accepted
