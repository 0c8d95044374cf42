"""The controls of a round: checkpoints that show whether choosing by score was worth it."""

import dagster as dg

from assets.shared import declared, rounds_of
from resources.accelerator import Accelerator
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline import rounds
from rsft_pipeline.home import Home
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps.train import train


def controls(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        **declared(
            recipe,
            kinds={"pytorch", "mlflow"},
            reads=("accepted",),
            partitions_def=rounds_of(recipe),
        )
    )
    def controls(
        context: dg.AssetExecutionContext, store: StoreResource, accelerator: Accelerator, tracking: Tracking
    ) -> dg.MaterializeResult:
        """Weights trained like the checkpoint, but on candidates not chosen by score. Writes `checkpoints` too."""
        home, made = Home.here(), {}
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            start = rounds.starting_weights(lake, round_.recipe, home, round_.key, round_.recipe.training.start)
            for trained_on in round_.recipe.controls:
                with (
                    accelerator.lease(context.log) as device,
                    track(f"{round_.key} {trained_on}", None, context.log) as show,
                ):
                    made[trained_on] = train(lake, round_, start, home, device, context.run.run_id, show, trained_on)
        for name, control in made.items():
            tracking.metrics(round_.mlflow_run_id, {f"train/samples_{name}": control.samples})
        return dg.MaterializeResult(
            data_version=dg.DataVersion(" ".join(control.checkpoint.digest for control in made.values())),
            metadata={
                **{f"{name}_checkpoint": control.checkpoint.digest for name, control in made.items()},
                **{f"{name}_samples": control.samples for name, control in made.items()},
            },
        )

    return controls
