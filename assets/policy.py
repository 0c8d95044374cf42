"""The policy of a round: which weights it samples from.

Dagster allows no cycle checkpoint → candidates → checkpoint, so this asset closes the loop at run
time: after the prompts are read, it looks up the weights and records where they came from.
"""

import dagster as dg

from assets.shared import as_run, declared, key, rounds_of
from resources import pages
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline import models, rounds
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import draw


def policy(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(**declared(recipe, kinds={"huggingface", "mlflow"}, reads=("prompts",), partitions_def=rounds_of(recipe)))
    def policy(context: dg.AssetExecutionContext, store: StoreResource, tracking: Tracking) -> dg.MaterializeResult:
        """The weights that this round draws from: the champion, the previous checkpoint, or the base model.

        Begins the round: writes its row of the table `rounds` and its MLflow run.
        """
        now, round_key = as_run(recipe, context), context.partition_key
        rounds.number(round_key)  # a partition may have been added by hand
        if now.controls and not recipe.controls:
            raise rounds.RoundError(
                f"{now.name} now has `controls`, but this job has no such asset: if they are in the recipe's file, "
                "reload the code location; if they were given at launch, use `rsft run --set`"
            )
        with store.open() as lake:
            earlier = rounds.check_nothing_stands_on(lake, now.name, round_key)  # before MLflow hears of the attempt
            weights = rounds.starting_weights(lake, now, Home.here(), round_key, now.policy)
            teacher = now.sampling.teacher and models.teacher(now, weights.path)
            drawn_from = teacher.digest if teacher else weights.digest
            answers = draw.answers(lake, now)
            run_id = tracking.begin(
                now.name,
                round_key,
                instead_of=earlier and earlier["mlflow_run_id"],
                params=now.model_dump(mode="json"),
                dagster_run_id=context.run.run_id,
                policy=weights.digest,
            )
            begun = rounds.Round(now, round_key, weights.digest, weights.source, drawn_from, run_id, answers)
            rounds.begin(lake, begun, context.run.run_id)
        context.log.info("%s samples from %s (%s)", round_key, weights.source, weights.digest)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(weights.digest),
            tags={"rsft/policy": weights.digest, "rsft/source": weights.source},
            metadata={
                "policy": weights.digest,
                "source": weights.source,
                "drawn_from": drawn_from,
                "path": dg.MetadataValue.path(str(weights.path)),
                "source_event": _event(recipe, context, weights.source),
                "recipe_digest": now.digest,
                "mlflow_run": dg.MetadataValue.url(pages.mlflow_run(run_id)),
            },
        )

    return policy


def _event(recipe: Recipe, context: dg.AssetExecutionContext, source: str) -> int | str:
    """Storage id of the materialisation that made the weights: the edge that the asset graph cannot show."""
    if source == "base":
        return "base model"
    records = dg.AssetRecordsFilter(asset_key=key(recipe, "checkpoint"), asset_partitions=[source])
    found = context.instance.fetch_materializations(records, limit=1).records
    return found[0].storage_id if found else "not known to this Dagster instance"
