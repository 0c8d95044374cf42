"""The candidates of a round: completions drawn from its policy."""

import time

import dagster as dg

from assets.shared import declared, rounds_of
from resources import pages
from resources.accelerator import Accelerator
from resources.sampler import TransformersSampler
from resources.store import StoreResource
from rsft_pipeline import models, report, rounds
from rsft_pipeline.home import Home
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import until
from rsft_pipeline.steps.draw import ask, draw_all


def candidates(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        **declared(
            recipe,
            kinds={"pytorch", "duckdb"},
            reads=("prompts", "policy"),
            partitions_def=rounds_of(recipe),
        )
    )
    def candidates(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        accelerator: Accelerator,
        sampler: TransformersSampler,
    ) -> dg.MaterializeResult:
        """Completions of the training prompts, from policy, teacher or references. Appends to `candidates`.

        Drawn in waves, each persisted whole: a run that was killed continues where it stopped. With `sampling.until`,
        candidates are scored here too.
        """
        began = time.monotonic()
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            weights = rounds.drawing_weights(lake, round_, Home.here())
            tokenizer, run_id = models.tokenizer(weights.path), context.run.run_id
            asked = ask(lake, round_, tokenizer, split="train", run_id=run_id)
            with (
                accelerator.lease(context.log) as device,
                sampler.session(weights.path, round_.recipe, device) as session,
                track(f"{round_.key} draws", None, context.log) as show,
            ):
                if round_.recipe.sampling.until:
                    drawn, tokens = until.draw(lake, round_, session, asked, device=device, run_id=run_id, show=show)
                else:
                    drawn, tokens = draw_all(lake, round_, session, asked, run_id=run_id, show=show)
            facts = report.candidates(lake, round_)
        seconds = time.monotonic() - began
        return dg.MaterializeResult(
            data_version=dg.DataVersion(facts.digest),
            metadata={
                "dagster/partition_row_count": facts.number,
                "drawn_in_this_run": drawn,
                "origin": round_.recipe.sampling.source,
                "drawn_from": round_.drawn_from,
                "tokens": facts.tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "stopped_by_itself": facts.stopped,
                "prompts": facts.prompts,
                "mean_log_q": facts.log_q,
                "examples": dg.MetadataValue.md(facts.examples),
                "audit": dg.MetadataValue.url(pages.audit(pages.round_(recipe.name, round_.key))),
            },
        )

    return candidates
