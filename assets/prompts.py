"""The prompts of a recipe, and the quarantine of the rows that cannot become prompts."""

from collections import Counter

import dagster as dg

from assets.shared import as_run, declared
from resources.store import StoreResource
from rsft_pipeline.home import Home
from rsft_pipeline.markdown import table
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps.ingest import ingest


def prompts(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(**declared(recipe, kinds={"duckdb", "huggingface"}))
    def prompts(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        """What the policy is asked. Writes the tables `prompts` and `quarantine`.

        Rows are read from the recipe's source and its inbox, rendered, and split by hash into training and
        held-out prompts. A row that cannot become a prompt goes to quarantine with the reason.
        """
        now, round_key = as_run(recipe, context), context.run.tags.get("dagster/partition")
        with store.open() as lake, track("bootstrap", None, context.log) as show:
            read = ingest(lake, now, Home.here(), context.run.run_id, show, round_key)
        splits = Counter(prompt.split for prompt in read.prompts)
        reasons = Counter(row.reason for row in read.refused)
        context.log.info("%d rows: %d prompts, %d in quarantine", read.rows, len(read.prompts), len(read.refused))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(read.digest),
            metadata={
                "dagster/row_count": len(read.prompts),
                "rows_read": read.rows,
                "train": splits["train"],
                "eval": splits["eval"],
                "quarantined": len(read.refused),
                "quarantine_reasons": dict(reasons),
                "examples": dg.MetadataValue.md(
                    table([{"prompt": p.text, "reference": p.reference, "split": p.split} for p in read.prompts[:8]])
                ),
                "refused": dg.MetadataValue.md(
                    table([{"line": r.line, "reason": r.reason, "detail": r.detail} for r in read.refused[:8]])
                ),
            },
        )

    return prompts
