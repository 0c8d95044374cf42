"""The evaluation of a round, and the promotion gate: does the checkpoint become the champion?"""

from dataclasses import asdict

import dagster as dg

from assets.shared import declared, rounds_of
from resources import pages
from resources.accelerator import Accelerator
from resources.sampler import TransformersSampler
from resources.store import StoreResource
from resources.tracking import Tracking
from rsft_pipeline import models, report, rounds
from rsft_pipeline.card import card
from rsft_pipeline.evaluation import Summary, shown
from rsft_pipeline.home import Home
from rsft_pipeline.markdown import picture, table
from rsft_pipeline.models import checkpoints
from rsft_pipeline.progress import track
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import draw, evaluate
from rsft_pipeline.steps.rows import EVALUATION_CANDIDATES, of_evaluation
from rsft_pipeline.steps.score import score


def evaluation(recipe: Recipe) -> dg.AssetsDefinition:
    @dg.asset(
        **declared(
            recipe,
            kinds={"pytorch", "mlflow"},
            reads=("checkpoint", "controls") if recipe.controls else ("checkpoint",),
            partitions_def=rounds_of(recipe),
        )
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        accelerator: Accelerator,
        sampler: TransformersSampler,
        tracking: Tracking,
    ) -> dg.MaterializeResult:
        """Policy, checkpoint and champion on held-out prompts. Writes `evaluations` and finishes the round.

        Weights that were evaluated before keep their draws. A checkpoint becomes champion only through this gate.
        """
        home = Home.here()
        with store.open() as lake:
            round_ = rounds.resume(lake, recipe, context.partition_key)
            contest = evaluate.contest(lake, round_, home)
            for weights in contest.weights:
                _draw_and_score(context, lake, round_, weights, accelerator, sampler)
            outcome = evaluate.judge(lake, round_, contest, context.run.run_id)
            by_scorer = report.held_out_scores(lake, round_, contest)
            labelled = round_.recipe.task == "classification" and round_.recipe.prompts.reference is not None
            by_class = report.by_class(lake, round_, contest) if labelled else None
            path = rounds.locate(lake, round_.recipe, home, contest.checkpoint).path
            measured = asdict(outcome.summaries["checkpoint"])
            checkpoints.write_card(path, card(checkpoints.read_meta(path), measured, outcome.verdict))
            version = tracking.register(round_.mlflow_run_id, recipe.name, contest.checkpoint, path)
            champion = contest.checkpoint if outcome.promoted else contest.champion
            tracking.set_champion(recipe.name, rounds.in_use(lake, recipe.name, round_.key, champion))
            _track(tracking, round_, outcome, by_scorer, by_class)
            try:
                evaluate.conclude(lake, round_, contest, outcome)  # from here on the round counts as done
            except rounds.RoundError:  # revoked in the meantime
                tracking.set_champion(recipe.name, rounds.champion(lake, recipe.name))
                raise
            lake.compact()
            plot = report.rounds_plot(recipe.name, round_.recipe.promotion.metric, rounds.history(lake, recipe.name))
        file = home.folder("reports") / f"{recipe.name}.png"
        file.write_bytes(plot)
        tracking.file(round_.mlflow_run_id, file)
        context.log.info("%s: %s", round_.key, outcome.verdict)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(contest.checkpoint),
            metadata={
                "promoted": outcome.promoted,
                "verdict": outcome.verdict,
                "difference": outcome.comparison.difference,
                "length_drift": outcome.comparison.length_drift,
                **{f"over_{role}": shown(one.difference, one.low, one.high) for role, one in outcome.controls.items()},
                **_numbers(outcome.summaries["checkpoint"]),
                "summary": dg.MetadataValue.md(_table(outcome)),
                "scorers": dg.MetadataValue.md(by_scorer.table),
                **({"classes": dg.MetadataValue.md(by_class.table)} if by_class else {}),
                "rounds": dg.MetadataValue.md(picture(plot, "held-out metric by round")),
                "registered_version": version,
                "mlflow_run": dg.MetadataValue.url(pages.mlflow_run(round_.mlflow_run_id)),
            },
        )

    return evaluation


def _draw_and_score(
    context, lake, round_, weights: str, accelerator: Accelerator, sampler: TransformersSampler
) -> None:
    policy = rounds.locate(lake, round_.recipe, Home.here(), weights)
    asked = draw.ask(lake, round_, models.tokenizer(policy.path), split="eval", run_id=context.run.run_id)
    draws = range(round_.recipe.evaluation.draws)
    with accelerator.lease(context.log) as device:
        # Planned with the lease: another round that evaluates the same weights may have drawn for them before.
        waves = draw.plan(lake, round_, weights, asked, split="eval", draws=draws)
        missing = sum(len(requests) for _, requests in waves)
        if missing:
            with (
                sampler.session(policy.path, round_.recipe, device) as session,
                track(f"{round_.key} evaluation", missing, context.log) as show,
            ):
                draw.draw(lake, round_, weights, session, waves, split="eval", run_id=context.run.run_id, show=show)
        score(
            lake,
            round_,
            EVALUATION_CANDIDATES,
            of_evaluation(round_, weights),
            device=device,
            run_id=context.run.run_id,
            show=lambda *_: None,
        )


def _numbers(summary: Summary) -> dict[str, float]:
    estimates = {name: getattr(summary, name) for name in ("pass_at_1", "pass_at_k", "mean_score", "eligible")}
    return {
        **{name: estimate.value for name, estimate in estimates.items() if estimate},
        "distinct_ratio": summary.distinct_ratio,
        "mean_tokens": summary.mean_tokens,
    }


def _table(outcome: evaluate.Outcome) -> str:
    return table({"weights": role, **_numbers(summary)} for role, summary in outcome.summaries.items())


def _track(
    tracking: Tracking,
    round_: rounds.Round,
    outcome: evaluate.Outcome,
    by_scorer: report.HeldOutScores,
    by_class: report.ClassFacts | None,
) -> None:
    run = round_.mlflow_run_id
    for role, summary in outcome.summaries.items():
        tracking.metrics(run, {f"{role}/{name}": value for name, value in _numbers(summary).items()})
    for role, means in by_scorer.means.items():
        tracking.metrics(run, {f"{role}/scorers/{name}": mean.value for name, mean in means.items() if mean})
    if by_class:
        tracking.metrics(run, {f"{role}/macro_f1": f1 for role, f1 in by_class.macro_f1.items()})
    tracking.metrics(run, {"promoted": float(outcome.promoted), "difference": outcome.comparison.difference})
    tracking.metrics(run, {f"over_{role}": found.difference for role, found in outcome.controls.items()})
    tracking.tags(run, verdict=outcome.verdict)
    tracking.end(run)
