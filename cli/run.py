"""`rsft run`: rounds from the command line.

A round started here is the same Dagster job as one started in the UI: same assets, same partitions,
recorded in the same instance.
"""

import json
import sys
import textwrap
import uuid
from contextlib import suppress
from typing import Annotated, Any

import typer

from cli import here, status
from cli.check import RecipeArgument, SetOption, checked, command, overrides_of
from cli.console import JsonOption, say
from rsft_pipeline import rounds
from rsft_pipeline.home import Home
from rsft_pipeline.progress import watch
from rsft_pipeline.recipe import reading
from rsft_pipeline.recipe.evaluation import MOST_ROUNDS
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.store import Store


def run(
    recipe: RecipeArgument,
    rounds_: Annotated[
        int | None,
        typer.Option(
            "--rounds",
            min=1,
            help="At most this many rounds, whatever `stop.rounds` is; default: until a stop rule holds.",
        ),
    ] = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Run rounds. An unfinished round is finished first, from where it stopped."""
    overrides = overrides_of(set_)
    file = here.recipe_file(recipe)
    loaded = _linked(checked(reading.load(file, overrides)))
    here.device()
    here.tracking().check()
    watch()
    instance = here.instance()
    finished, failure = [], None
    while rounds_ is None or len(finished) < rounds_:
        with suppress(RecipeError):  # if the file is broken by now, the round itself says what is wrong
            loaded = reading.load(file, overrides)
        with here.store() as store:
            reason = rounds.why_stop(store, loaded if rounds_ is None else _unlimited(loaded))
            round_key = rounds.following(store, loaded.name)
            if not reason:
                _tell_changed(store, loaded, round_key, overrides)
            elif not finished:  # otherwise the results below say why
                asked_anyway = _asked_anyway(store, loaded, overrides)
                say(f"{loaded.name}: no further round: {reason}{asked_anyway}", style="yellow")
        if reason:
            break
        with Home.here().lock(f"round of {loaded.name}", wait=False) as alone:
            if not alone:
                raise RecipeError(f"another `rsft run {loaded.name}` is under way in {Home.here().path}")
            left = None if rounds_ is None else rounds_ - len(finished)
            failure = _execute(instance, loaded, round_key, overrides, left)
        if failure:
            break
        finished.append(round_key)
    with here.store() as store:
        status.show(store, loaded.name, finished)
        if finished:
            status.show_pages()
        if json_:
            told = {"failed": failure} if failure else {}
            print(json.dumps(status.summary(store, loaded.name, finished) | told))
    if failure:
        raise typer.Exit(130 if failure["interrupted"] else 1)


def _asked_anyway(store: Store, recipe: Recipe, overrides: dict[str, str]) -> str:
    """How to run one more round for files in the inbox; empty without an inbox, or if that would run none either."""
    inbox = recipe.prompts.inbox
    if not inbox or rounds.why_stop(store, _unlimited(recipe)):
        return ""
    return f"; to read new files in {recipe.path(inbox)}: {command(recipe.name, overrides, 1)}"


def _execute(
    instance, recipe: Recipe, round_key: str, overrides: dict[str, str], left: int | None
) -> dict[str, Any] | None:
    """Run a round. If it fails, say why and return that as JSON has it.

    Args:
        left: how many rounds are left to run, this one included; None without `--rounds`.
    """
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
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},  # a failure is reported below
            raise_on_error=False,
        )
    )
    return (
        None if result.success else _failed(instance, run_id, recipe, round_key, command(recipe.name, overrides, left))
    )


def _failed(instance, run_id: str, recipe: Recipe, round_key: str, again: str) -> dict[str, Any]:
    from automation import failures

    failure = failures.of_run(instance, run_id)
    if failure.interrupted:
        say(f"{recipe.name} {round_key} was interrupted; to resume it: {again}", style="yellow")
    else:
        for stack in failure.stacks:
            print(stack, file=sys.stderr)
        say(f"{recipe.name} {round_key} failed", style="bold red")
        for reason in failure.why:
            say(textwrap.indent(reason, "  "), style="red")
        say(f"  whole log: `rsft ui`, then Dagster's run {run_id}")
    return {
        "round": round_key,
        "interrupted": failure.interrupted,
        "why": failure.why,
        "dagster_run_id": run_id,
    }


def _tell_changed(store: Store, recipe: Recipe, round_key: str, overrides: dict[str, str]) -> None:
    """Say which settings have changed since a round was begun: a `--set` may have been forgotten."""
    try:
        changed = rounds.record(store, recipe, round_key).recipe.differing(recipe)
    except rounds.RoundError:  # it was not begun, or with settings that are now refused
        return
    if changed:
        lines = [f"{recipe.name} {round_key} was begun with other settings; it starts over with the present ones:"]
        lines += [f"  {path} was {was}, is {now}" for path, (was, now) in changed.items()]
        kept = {
            path: text for path, text in overrides.items() if not any(f"{path}.".startswith(f"{c}.") for c in changed)
        }
        lines.append(f"as before: {command(recipe.name, kept | {path: was for path, (was, _) in changed.items()})}")
        say("\n".join(lines), style="yellow")


def _linked(recipe: Recipe) -> Recipe:
    """The recipe itself; if it lives elsewhere, it is linked into this home, so that Dagster shows it too."""
    link = Home.here().recipes / recipe.file.name
    if recipe.file != (reading.RECIPES / recipe.file.name).resolve() and link.resolve() != recipe.file:
        link.unlink(missing_ok=True)
        link.symlink_to(recipe.file)
    return recipe


def _unlimited(recipe: Recipe) -> Recipe:
    """The recipe without its limit `stop.rounds`, which `--rounds` replaces."""
    return recipe.model_copy(update={"stop": recipe.stop.model_copy(update={"rounds": MOST_ROUNDS})})
