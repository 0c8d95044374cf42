"""`rsft status`: the rounds so far, for people and as JSON."""

import itertools
import json
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from cli import here
from cli.check import command
from cli.console import JsonOption, console, say
from resources import pages
from rsft_pipeline import rounds
from rsft_pipeline.evaluation import shown
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.report import NAMES
from rsft_pipeline.steps.evaluate import finite, over_controls
from rsft_pipeline.store import Store


def status(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or path; default: all.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show the rounds so far, of one recipe or of all."""
    with here.store() as store:
        there = [row["recipe"] for row in store.query("SELECT DISTINCT recipe FROM rounds ORDER BY recipe")]
        names = [here.recipe_name(recipe)] if recipe else there
        for name in names:
            if name not in there:
                raise RecipeError(f"{here.recipe_file(recipe).stem} has no rounds yet: rsft run {recipe}")
        if json_:
            summaries = [summary(store, name, None) for name in names]
            print(json.dumps(summaries[0] if recipe else summaries))
            return
        for name in names:
            show(store, name, None)
        if there:
            show_pages()
        else:
            say("no rounds yet: rsft run arithmetic")


def show(store: Store, recipe: str, only: list[str] | None) -> None:
    """Print the finished rounds of a recipe, or only those in `only`, and where the loop stands."""
    rows = _rows(store, recipe, only)
    if refused := _refused(store, recipe):
        say(f"{recipe}: {refused}", style="yellow")
    if only is None:
        for row in _unfinished(store, recipe):
            say(f"{recipe} {row['round']}: {_standing(row)}", style="yellow")
    if not rows:
        return
    table = Table(
        title=f"{recipe}: held-out results, policy → checkpoint", title_justify="left", box=box.SIMPLE, pad_edge=False
    )
    for column in ("round", "accepted", "pass@1", "pass@k", "score", "gate"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        before, after = json.loads(row["policy_eval"]), json.loads(row["checkpoint_eval"])
        table.add_row(
            row["round"],
            f"{row['accepted']:,} ({row['accepted'] / row['candidates']:.0%})",
            *(_change(before[name], after[name]) for name in ("pass_at_1", "pass_at_k", "mean_score")),
            "promoted" if row["promoted"] else "kept",
        )
    console.print(table)
    for row in rows:
        say(f"{row['round']}: {row['verdict']}")
        for role, found in over_controls(store.query, row).items():
            difference = shown(found.difference, found.low, found.high)
            say(f"{row['round']}: {NAMES[found.metric]} over the control `{role}`: {difference}")
    for before, row in itertools.pairwise(rows):
        if _judged_by(before) != _judged_by(row):
            say(
                f"{row['round']} was judged by other scorers or settings of `evaluation` than {before['round']}: "
                f"rsft audit diff {recipe} {before['round']} {row['round']}",
                style="yellow",
            )
    if reason := rounds.why_stopped(store, recipe):
        say(f"{recipe}: no further round: {reason}", style="yellow")
    say(f"champion: {rows[-1]['champion']}   home: {Home.here().path}")


def summary(store: Store, recipe: str, only: list[str] | None) -> dict[str, Any]:
    """What `show` prints, as JSON has it."""
    every = rounds.history(store, recipe)
    return {
        "recipe": recipe,
        "rounds": [
            {
                "round": row["round"],
                "candidates": row["candidates"],
                "accepted": row["accepted"],
                "distinct_accepted": row["distinct_accepted"],
                "acceptance_rate": row["accepted"] / row["candidates"],
                "eval": _values(row["checkpoint_eval"]),
                "policy_eval": _values(row["policy_eval"]),
                "promoted": row["promoted"],
                "verdict": row["verdict"],
                "over": finite({role: asdict(found) for role, found in over_controls(store.query, row).items()}),
                "checkpoint": row["checkpoint"],
                "mlflow_run_id": row["mlflow_run_id"],
                "dagster_run_id": row["dagster_run_id"],
            }
            for row in _rows(store, recipe, only)
        ],
        "unfinished": {row["round"]: row["state"] for row in _unfinished(store, recipe)},
        "champion": every[-1]["champion"] if every else None,
        "stopped": rounds.why_stopped(store, recipe),
    }


def show_pages() -> None:
    """Print where the results can be seen."""
    say("in a browser: `rsft ui` (or `make ui`)")
    for server in pages.SERVERS:
        say(f"  {server:<8} {pages.at(server)}")


def _rows(store: Store, recipe: str, only: list[str] | None) -> list[dict[str, Any]]:
    rows = rounds.history(store, recipe)
    return rows if only is None else [row for row in rows if row["round"] in only]


def _refused(store: Store, recipe: str) -> str:
    """How many rows of the sources were refused, and why, in words; empty if none was."""
    sql = "SELECT reason, count(*) AS n FROM quarantine WHERE recipe = ? GROUP BY reason ORDER BY n DESC, reason"
    reasons = store.query(sql, [recipe])
    named = ", ".join(f"{row['n']:,} {row['reason']}" for row in reasons)
    return f"rows refused: {named} (Quarantine, in the audit pages)" if reasons else ""


def _unfinished(store: Store, recipe: str) -> list[dict[str, Any]]:
    sql = "SELECT * FROM rounds WHERE recipe = ? AND state <> 'finished' ORDER BY round"
    return store.query(sql, [recipe])


def _standing(unfinished: dict[str, Any]) -> str:
    """Where an unfinished round stands, how to go on, and why it ended, if it did."""
    from assets.shared import overrides
    from automation import failures, runs

    if unfinished["state"] == "revoked":
        return f"revoked: `{command(unfinished['recipe'], {})}` runs it again"
    instance = here.instance()
    under_way = {run.run_id for run in runs.under_way(instance)}
    last = runs.last(instance, unfinished["recipe"], unfinished["round"])
    tried = [
        *([last.run_id] if last else []),
        unfinished["dagster_run_id"],
    ]  # the second may be a run without a job, started by hand
    for run_id in tried:
        if run_id in under_way:
            return f"under way, in Dagster's run {run_id}"
    why = "; ".join(failures.of_run(instance, tried[0]).why)
    given: dict[str, str] = {}
    with suppress(RecipeError):  # if its tag cannot be read; the run has failed because of that
        if run := instance.get_run_by_id(tried[0]):
            given = overrides(run)
    resumed = f"`{command(unfinished['recipe'], given)}` resumes it"
    return f"begun, not finished: {resumed}{f' (it ended with: {why})' if why else ''}"


def _judged_by(row: dict[str, Any]) -> tuple:
    """What the held-out results of a round depend on, apart from weights and prompts."""
    return row["evaluation_scorers"] or row["scorers"], json.loads(row["settings"])["evaluation"]


def _values(summary: str) -> dict[str, float | None]:
    estimates = json.loads(summary)
    return {
        name: estimates[name]["value"] if estimates[name] else None for name in ("pass_at_1", "pass_at_k", "mean_score")
    }


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    return f"{before['value']:.3f} → {after['value']:.3f}" if before and after else "-"
