"""The candidates of a round: completions drawn from its policy."""

import time

import dagster as dg

from assets.shared import declared, rounds_of
from resources.accelerator import Accelerator
from resources.sampler import TransformersSampler
from resources.store import StoreResource
from rsft_pipeline import models, report, rounds, steps
from rsft_pipeline.home import Home
from rsft_pipeline.progress import track
from rsft_pipeline.recipe import Recipe


def candidates(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        **declared(
            recipe,
            kinds={"pytorch", "duckdb"},
            reads=("prompts", "policy"),
            partitions_def=rounds_of(recipe),
            pool="gpu",
        )
    )
    def candidates(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        accelerator: Accelerator,
        sampler: TransformersSampler,
    ) -> dg.MaterializeResult:
        """Completions of the training prompts, drawn from the policy. Appends to the table `candidates`.

        Drawn in waves, each persisted whole: a run that was killed goes on where it stopped.
        """
        began = time.monotonic()
        with store.open() as lake:
            round_ = rounds.record(lake, recipe, context.partition_key)
            policy = rounds.locate(lake, round_.recipe, Home.here(), round_.policy)
            waves = steps.plan(
                lake, round_, round_.policy, models.tokenizer(policy.path), split="train", run_id=context.run.run_id
            )
            missing = sum(len(requests) for _, requests in waves)
            with (
                accelerator.lease(context.log) as device,
                sampler.session(policy.path, round_.recipe, device) as session,
                track(f"{round_.key} draws", missing, context.log) as show,
            ):
                tokens = steps.draw(
                    lake, round_, round_.policy, session, waves, split="train", run_id=context.run.run_id, show=show
                )
            facts = report.candidates(lake, round_)
        seconds = time.monotonic() - began
        return dg.MaterializeResult(
            data_version=dg.DataVersion(facts.digest),
            metadata={
                "dagster/partition_row_count": facts.number,
                "drawn_in_this_run": missing,
                "tokens": facts.tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "stopped_by_itself": facts.stopped,
                "prompts": facts.prompts,
                "mean_log_q": facts.log_q,
                "examples": dg.MetadataValue.md(facts.examples),
            },
        )

    return candidates
