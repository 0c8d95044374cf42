"""`rsft run`, `status`, `check`, `schema`: rounds and recipes from the command line.

A round started here is the same Dagster job as one started in the UI: same assets, same partitions,
recorded in the same instance.
"""

import json
import shlex
import sys
import textwrap
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from cli import here
from cli.console import console
from resources import pages
from rsft_pipeline import models, prompts, rounds, scoring
from rsft_pipeline.evaluation import shown
from rsft_pipeline.home import Home
from rsft_pipeline.progress import watch
from rsft_pipeline.recipe import reading
from rsft_pipeline.recipe.evaluation import MOST_ROUNDS
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.report import NAMES
from rsft_pipeline.steps.evaluate import finite, over_controls
from rsft_pipeline.store import Store

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A name in recipes/, or a path to a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a field of the recipe; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def run(
    recipe: RecipeArgument,
    rounds_: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Run this many rounds now; default: until a stop rule holds.")
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Run rounds. One that was interrupted is finished first, from where it stopped."""
    overrides = overrides_of(set_)
    file = here.recipe_file(recipe)
    loaded = _linked(_checked(reading.load(file, overrides)))
    here.device()
    here.tracking().check()
    watch()
    instance = here.instance()
    finished, failure = [], None
    while rounds_ is None or len(finished) < rounds_:
        with suppress(RecipeError):  # of a file that is broken by now the round itself says what is wrong
            loaded = reading.load(file, overrides)
        with here.store() as store:
            reason = rounds.why_stop(store, loaded if rounds_ is None else _unlimited(loaded))
            round_key = rounds.following(store, loaded.name)
            if not reason:
                _tell_changed(store, loaded, round_key)
        if reason:
            if not finished:  # else it is told below what they gave
                console.print(f"{loaded.name}: no further round: {reason}{_asked_anyway(loaded)}", style="yellow")
            break
        with Home.here().lock(f"round of {loaded.name}", wait=False) as alone:
            if not alone:
                raise RecipeError(f"another `rsft run {loaded.name}` is under way in {Home.here().path}")
            failure = _execute(instance, loaded, round_key, overrides)
        if failure:
            break
        finished.append(round_key)
    with here.store() as store:
        _show(store, loaded.name, finished)
        if finished:
            _show_pages()
        if json_:
            told = {"failed": failure} if failure else {}
            print(json.dumps(_summary(store, loaded.name, finished) | told))
    if failure:
        raise typer.Exit(130 if failure["interrupted"] else 1)


def status(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Only this recipe.")] = None,
    json_: JsonOption = False,
) -> None:
    """The rounds so far, of one recipe or of all."""
    with here.store() as store:
        there = [row["recipe"] for row in store.query("SELECT DISTINCT recipe FROM rounds ORDER BY recipe")]
        names = [here.recipe_name(recipe)] if recipe else there
        for name in names:
            if name not in there:
                raise RecipeError(f"{here.recipe_file(recipe).stem} has no rounds yet: rsft run {recipe}")
            _show(store, name, None)
        if there:
            _show_pages()
        if not names:
            console.print("no rounds yet: rsft run arithmetic")
        if json_:
            summaries = [_summary(store, name, None) for name in names]
            print(json.dumps(summaries[0] if recipe else summaries))


def check(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Say whether a recipe can run: its fields, and what they name. Runs nothing."""
    loaded = _checked(reading.load(here.recipe_file(recipe), overrides_of(set_)))
    able = f"{loaded.file}: {loaded.name} can run (digest {loaded.digest})"
    console.print(able, soft_wrap=True, highlight=False, markup=False)
    hub = [f"{source}, which is no folder here and is taken for a model on the hub" for source in models.on_hub(loaded)]
    rows = "the rows of the source behind the first good one, and whether a prompt fits into the model's context"
    for one in (*hub, rows):
        console.print(f"  left to the round: {one}", soft_wrap=True, highlight=False, markup=False)


def schema() -> None:
    """JSON Schema of recipes, for editors that complete and check YAML."""
    print(json.dumps(reading.schema(), indent=2))


# --- running -----------------------------------------------------------------------------------


def _asked_anyway(recipe: Recipe) -> str:
    """What to type for a round that no rule asks for: files may wait in the inbox."""
    inbox = recipe.prompts.inbox
    return f"; one reads what is new in {recipe.path(inbox)}: {_command(recipe, {})} --rounds 1" if inbox else ""


def _execute(instance, recipe: Recipe, round_key: str, overrides: dict[str, str]) -> dict[str, Any] | None:
    """Run a round. Of one that fails: what it says as JSON has it, once people are told."""
    from assets.shared import OVERRIDES, rounds_of
    from automation.jobs import job_name
    from automation.runs import busy
    from definitions import build
    from resources import process

    if busy(instance, recipe):
        raise RecipeError(f"a round of {recipe.name} is under way in Dagster: wait for it, or cancel it in the UI")
    instance.add_dynamic_partitions(rounds_of(recipe).name, [round_key])
    run_id = str(uuid.uuid4())
    tags = {process.TAG: process.this_process(run_id), **({OVERRIDES: json.dumps(overrides)} if overrides else {})}
    result = (
        build([recipe])
        .resolve_job_def(job_name(recipe))
        .execute_in_process(
            instance=instance,
            partition_key=round_key,
            run_id=run_id,
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},  # what fails is told below
            raise_on_error=False,
        )
    )
    return None if result.success else _failed(instance, run_id, recipe, round_key, overrides)


def _failed(instance, run_id: str, recipe: Recipe, round_key: str, overrides: dict[str, str]) -> dict[str, Any]:
    from automation import failures

    failure = failures.of_run(instance, run_id)
    if failure.interrupted:
        told = f"{recipe.name} {round_key} was interrupted: run it again to go on: {_command(recipe, overrides)}"
        console.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)
    else:
        for stack in failure.stacks:
            print(stack, file=sys.stderr)
        console.print(f"{recipe.name} {round_key} failed", style="bold red")
        for reason in failure.why:
            console.print(textwrap.indent(reason, "  "), style="red", markup=False, soft_wrap=True)
        console.print(f"  whole log: rsft ui, run {run_id}", markup=False, soft_wrap=True)
    return {
        "round": round_key,
        "interrupted": failure.interrupted,
        "why": failure.why,
        "dagster_run_id": run_id,
    }


def _tell_changed(store: Store, recipe: Recipe, round_key: str) -> None:
    """Say which settings a round that begins again had otherwise: a `--set` may have been forgotten."""
    try:
        changed = rounds.record(store, recipe, round_key).recipe.differing(recipe)
    except rounds.RoundError:  # it was not begun, or by settings that are refused by now
        return
    if changed:
        lines = [f"{recipe.name} {round_key} was begun with other settings; it begins again with those of now:"]
        lines += [f"  {path} was {was}, is {now}" for path, (was, now) in changed.items()]
        lines.append(f"as it was: {_command(recipe, {path: was for path, (was, _) in changed.items()})}")
        console.print("\n".join(lines), style="yellow", highlight=False, markup=False, soft_wrap=True)


def _command(recipe: Recipe, overrides: Mapping[str, str]) -> str:
    """What to type to run the recipe so."""
    given = [word for path, text in overrides.items() for word in ("--set", f"{path}={text}")]
    return shlex.join(["rsft", "run", recipe.name, *given])


def _checked(recipe: Recipe) -> Recipe:
    """The recipe, once what it names is seen to be there: nothing has run by then."""
    import dagster as dg

    from definitions import build

    try:
        _check_name(recipe)
        prompts.check(recipe)
        scoring.check(recipe)
        prompts.check_room(recipe, models.check(recipe))
        dg.Definitions.validate_loadable(build([recipe]))
    except dg.DagsterError as error:  # of a recipe that was read these are all that it judges
        raise RecipeError(f"{recipe.file}: `schedule` or `owners`: {error}") from error
    except (ValueError, models.ModelError) as error:
        raise RecipeError(f"{recipe.file}: {error}") from error
    return recipe


def _linked(recipe: Recipe) -> Recipe:
    """Make a recipe from elsewhere known to this home, so that Dagster's UI shows it."""
    link = Home.here().recipes / recipe.file.name
    if recipe.file != (reading.RECIPES / recipe.file.name).resolve() and link.resolve() != recipe.file:
        link.unlink(missing_ok=True)
        link.symlink_to(recipe.file)
    return recipe


def _check_name(recipe: Recipe) -> None:
    """See that no other recipe has the recipe's name, by which this home keeps its rounds."""
    for folder in (reading.RECIPES, Home.here().recipes):
        other = folder / recipe.file.name
        if other.exists() and other.resolve() != recipe.file:
            raise RecipeError(f"a recipe called {recipe.name!r} is already {other.resolve()}; rename this file")


def _unlimited(recipe: Recipe) -> Recipe:
    """The recipe without a limit of rounds of its own: an explicit `--rounds` stands in for it."""
    return recipe.model_copy(update={"stop": recipe.stop.model_copy(update={"rounds": MOST_ROUNDS})})


def overrides_of(given: list[str] | None) -> dict[str, str]:
    found = {}
    for one in given or []:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {one}: expected a.b=value")
        found[key] = value
    return found


# --- showing -----------------------------------------------------------------------------------


def _rows(store: Store, recipe: str, only: list[str] | None) -> list[dict[str, Any]]:
    rows = rounds.history(store, recipe)
    return rows if only is None else [row for row in rows if row["round"] in only]


def _refused(store: Store, recipe: str) -> str:
    """How many rows of the sources are no prompts, and why, in words; empty where all are."""
    sql = "SELECT reason, count(*) AS n FROM quarantine WHERE recipe = ? GROUP BY reason ORDER BY n DESC, reason"
    reasons = store.query(sql, [recipe])
    named = ", ".join(f"{row['n']:,} {row['reason']}" for row in reasons)
    return f"rows refused: {named} (Quarantine, in the audit pages)" if reasons else ""


def _unfinished(store: Store, recipe: str) -> list[dict[str, Any]]:
    sql = "SELECT * FROM rounds WHERE recipe = ? AND state <> 'finished' ORDER BY round"
    return store.query(sql, [recipe])


def _standing(unfinished: dict[str, Any]) -> str:
    """Where a round that is not finished stands, and why it does not go on."""
    from automation import failures, runs

    taken_up = f"`rsft run {unfinished['recipe']}` takes it up"
    if unfinished["state"] == "revoked":
        return f"revoked; {taken_up}"
    instance = here.instance()
    under_way = {run.run_id for run in runs.under_way(instance)}
    last = runs.last(instance, unfinished["recipe"], unfinished["round"])
    run_id = last.run_id if last else unfinished["dagster_run_id"]  # none: its assets were materialised by hand
    if run_id in under_way:
        return f"under way, in Dagster's run {run_id}"
    why = "; ".join(failures.of_run(instance, run_id).why)
    return f"begun, not finished; {taken_up}{f' (it ended by: {why})' if why else ''}"


def _summary(store: Store, recipe: str, only: list[str] | None) -> dict[str, Any]:
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


def _values(summary: str) -> dict[str, float | None]:
    estimates = json.loads(summary)
    return {
        name: estimates[name]["value"] if estimates[name] else None for name in ("pass_at_1", "pass_at_k", "mean_score")
    }


def _show(store: Store, recipe: str, only: list[str] | None) -> None:
    rows = _rows(store, recipe, only)
    if refused := _refused(store, recipe):
        console.print(f"{recipe}: {refused}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if only is None:
        for row in _unfinished(store, recipe):
            words = f"{recipe} {row['round']}: {_standing(row)}"
            console.print(words, style="yellow", highlight=False, soft_wrap=True, markup=False)
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
        console.print(f"{row['round']}: {row['verdict']}", highlight=False, markup=False, soft_wrap=True)
        for role, found in over_controls(store.query, row).items():
            difference = shown(found.difference, found.low, found.high)
            told = f"{row['round']}: {NAMES[found.metric]} over the control `{role}`: {difference}"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
    if reason := rounds.why_stopped(store, recipe):
        console.print(f"{recipe}: no further round: {reason}", style="yellow", soft_wrap=True)
    state = f"champion: {rows[-1]['champion']}   state: {Home.here().path}"
    console.print(state, highlight=False, markup=False, soft_wrap=True)


def _show_pages() -> None:
    console.print("look at it: `rsft ui` (or `make ui`)", highlight=False)
    for server in pages.SERVERS:
        console.print(f"  {server:<8} {pages.at(server)}", highlight=False, markup=False)


def _change(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    return f"{before['value']:.3f} → {after['value']:.3f}" if before and after else "-"
