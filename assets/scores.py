"""The scores of a round's candidates."""

import dagster as dg

from assets.shared import declared, rounds_of
from resources.accelerator import Accelerator
from resources.store import StoreResource
from rsft_pipeline import report, rounds
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round
from rsft_pipeline.steps.score import score


def scores(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(**declared(recipe, kinds={"python", "duckdb"}, reads=("candidates",), partitions_def=rounds_of(recipe)))
    def scores(
        context: dg.AssetExecutionContext, store: StoreResource, accelerator: Accelerator
    ) -> dg.MaterializeResult:
        """The score of each candidate by each scorer, and combined. Appends to the table `scores`.

        A candidate that the same version of a scorer has judged before is not judged again.
        """
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            parameters = of_round(round_)
            total = lake.value(f"SELECT count(*) FROM ({ROUND_CANDIDATES})", parameters)
            with (
                accelerator.lease(context.log) as device,
                track(f"{round_.key} scores", None, context.log) as show,
            ):
                judged = score(
                    lake,
                    round_,
                    ROUND_CANDIDATES,
                    parameters,
                    device=device,
                    run_id=context.run.run_id,
                    show=show,
                )
            facts = report.scores(lake, round_)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(facts.digest),
            metadata={
                "dagster/partition_row_count": total,
                "judged_in_this_run": judged,
                "cannot_judge": facts.unjudged,
                "mean_score": facts.mean,
                "scorers": dg.MetadataValue.md(facts.table),
                "histogram": dg.MetadataValue.md(facts.histogram),
            },
        )

    return scores
