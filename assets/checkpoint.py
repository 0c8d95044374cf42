"""The checkpoint of a round: weights fine-tuned on the accepted set."""

import dagster as dg

from assets.shared import declared, rounds_of
from resources import pages
from resources.accelerator import Accelerator
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline import rounds
from rsft_pipeline.home import Home
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import gates
from rsft_pipeline.steps.train import Trained, train


def checkpoint(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        **declared(
            recipe,
            kinds={"pytorch", "mlflow"},
            reads=("accepted",),
            partitions_def=rounds_of(recipe),
        )
    )
    def checkpoint(
        context: dg.AssetExecutionContext, store: StoreResource, accelerator: Accelerator, tracking: Tracking
    ) -> dg.MaterializeResult:
        """Weights fine-tuned on the accepted set. Writes the tables `checkpoints` and `training_samples`.

        After a kill it continues from the last saved step.
        """
        home = Home.here()
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            for gate in gates.BLOCKING:  # again: a failed check stops only the run it ran in
                if not (finding := gate(lake, round_)).passed:
                    raise dg.Failure(f"{gate.__name__}: {finding.reason}", allow_retries=False)
            start = rounds.starting_weights(lake, round_.recipe, home, round_.key, round_.recipe.training.start)
            with (
                accelerator.lease(context.log) as device,
                track(f"{round_.key} training", None, context.log) as show,
            ):
                made = train(lake, round_, start, home, device, context.run.run_id, show)
        _track(tracking, round_, made)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(made.checkpoint.digest),
            tags={"rsft/parent": made.parent},
            metadata={
                "checkpoint": made.checkpoint.digest,
                "path": dg.MetadataValue.path(str(made.checkpoint.path)),
                "parent": made.parent,
                "accepted_digest": made.accepted_digest,
                "samples": made.samples,
                "loss": made.history.steps[-1].loss,
                "tokens_per_second": round(made.history.tokens_per_second, 1),
                "trainable_parameters": made.trainable,
                "parameters": made.total,
                "mlflow_run": dg.MetadataValue.url(pages.mlflow_run(round_.mlflow_run_id)),
                "audit": dg.MetadataValue.url(pages.audit(pages.checkpoint(recipe.name, made.checkpoint.digest))),
            },
        )

    return checkpoint


def _track(tracking: Tracking, round_: rounds.Round, made: Trained) -> None:
    run = round_.mlflow_run_id
    tracking.curve(run, "train/loss", [(step.step, step.loss) for step in made.history.steps])
    tracking.curve(run, "train/grad_norm", [(step.step, step.grad_norm) for step in made.history.steps])
    tracking.metrics(run, {"train/samples": made.samples, "train/tokens_per_second": made.history.tokens_per_second})
    tracking.tags(
        run,
        checkpoint=made.checkpoint.digest,
        parent=made.parent,
        accepted_digest=made.accepted_digest,
        merkle_root=made.merkle_root,
    )
    tracking.file(run, made.checkpoint.path / "meta.json")
