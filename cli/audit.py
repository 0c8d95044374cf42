"""`rsft audit`: its commands `replay`, `verify`, `whatif` and `diff`, and what all of them share.

Belongs here: arguments, and how an answer is shown. Not: the answers (rsft_pipeline/audit), nor the other
commands (lineage.py, audit_ui.py).

Every command reads the store of `$RSFT_HOME` and can be used while rounds run; only `revoke` writes.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Annotated, Any

import duckdb
import typer
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cli import here
from cli.check import RecipeArgument, overrides_of
from cli.console import JsonOption, console
from rsft_pipeline import rounds
from rsft_pipeline.audit import diff as differing
from rsft_pipeline.audit import replay as replaying
from rsft_pipeline.audit import verify as verifying
from rsft_pipeline.audit import whatif as asking
from rsft_pipeline.audit import words
from rsft_pipeline.audit.ids import AuditError, check_recipe, check_round
from rsft_pipeline.audit.ids import recipes as recipes_in
from rsft_pipeline.audit.ids import rounds as rounds_in
from rsft_pipeline.home import Home
from rsft_pipeline.recipe.reading import RECIPES, load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.store import Store

log = logging.getLogger(__name__)
app = typer.Typer(help="Ask what was done, check it, take it out of use, export it.", no_args_is_help=True)

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Look in this recipe only; default: in all recipes.")
]


@contextmanager
def opened(recipe: str | None = None) -> Iterator[Store]:
    """The store of this home, for the length of the `with`; it is not made if it is missing.

    Raises:
        AuditError: no round has run, the store has no such recipe, or DuckDB fails.
    """
    nothing = AuditError(f"no round has run in {Home.here().path} yet: there is nothing to ask about")
    if not os.environ.get("RSFT_CATALOG") and not (Home.here().path / "store").is_dir():
        raise nothing
    try:
        with here.store() as store:
            with suppress(duckdb.Error):  # a file cannot be read: `verify` and `replay` say which
                if not recipes_in(store):
                    raise nothing
            if recipe is not None:
                check_recipe(store, recipe)
            yield store
    except duckdb.Error as error:
        raise AuditError(f"the store of {Home.here().path} failed: {error}") from error


def recipe_named(store: Store, name: str) -> Recipe:
    """The recipe as its file is now. Raises AuditError if the store does not have it."""
    called = here.recipe_name(name)
    if not rounds_in(store, called):
        check_recipe(store, called)
    return load(here.recipe_file(name))


def recipe_of(store: Store, name: str, round_key: str) -> Recipe:
    """The same, for commands that need only stored rows: if the file is gone or broken, as the round recorded it."""
    try:
        return recipe_named(store, name)
    except RecipeError as error:
        called = here.recipe_name(name)
        check_round(store, called, round_key)
        print(f"{error}\nusing {called} as {round_key} recorded it", file=sys.stderr)
        return rounds.recorded(store, RECIPES / f"{called}.yaml", round_key)


def show(answer: Any, as_json: bool, render: Callable[[Any], RenderableType]) -> None:
    """Print an answer (a dataclass or a dictionary) as JSON, or as `render` draws it."""
    if as_json:
        told = asdict(answer) if hasattr(answer, "__dataclass_fields__") else answer
        print(json.dumps(_plain(told), allow_nan=False))
    else:
        drawn = render(answer)
        # Without wrapping, a tree would be cut off at the terminal's width.
        console.print(drawn, highlight=False, soft_wrap=not isinstance(drawn, Tree))


def _plain(value: Any) -> Any:
    """The value with text in place of what JSON cannot express: paths, times, bytes, numbers that are not finite."""
    match value:
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case bytes():
            return value.decode("utf-8", "replace")
        case str() | int() | None:
            return value
        case float() if math.isfinite(value):
            return value
        case _:
            return str(value)


# --- replay, verify, whatif, diff ---------------------------------------------------------------

RoundArgument = Annotated[str, typer.Argument(metavar="ROUND", help="r000, r001, …")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A digest or its beginning; or a recipe's name, with ROUND.")
]
RoundOfArgument = Annotated[
    str | None, typer.Argument(metavar="ROUND", help="With a recipe's name: the round that made the checkpoint.")
]


@app.command()
def replay(
    recipe: RecipeArgument,
    round_: RoundArgument,
    sample: Annotated[
        int, typer.Option(min=0, help="How many candidates' log-probabilities to compute again; 0 loads no model.")
    ] = replaying.FORCED,
    read: Annotated[
        int, typer.Option(min=0, help="How many candidates' texts to decode and judge again.")
    ] = replaying.JUDGED,
    tolerance: Annotated[
        float, typer.Option(min=0, help="By how much log-probabilities (nats per token) and models' scores may differ.")
    ] = replaying.TOLERANCE,
    json_: JsonOption = False,
) -> None:
    """Repeat a round's decisions from what is stored, and name every difference. Exits with 1 if there is any."""
    device = here.device()
    # Held as a round holds it, because two models at once may not fit into memory.
    lease = here.accelerator().lease(log) if sample else nullcontext(device)
    with opened() as store:
        answer = replaying.replay(
            store,
            recipe_named(store, recipe),
            round_,
            Home.here(),
            lease,
            forced=sample,
            judged=read,
            tolerance=tolerance,
        )
    head = f"{answer.recipe} {answer.round}: {answer.replayed:,} of {answer.decisions:,} decisions replayed"
    show(answer, json_, lambda _: _compared(head, answer))
    raise typer.Exit(0 if answer.ok else 1)


@app.command()
def verify(checkpoint: CheckpointArgument, round_: RoundOfArgument = None, json_: JsonOption = False) -> None:
    """Check that a checkpoint's weights and training set are as recorded. Exits with 1 if anything differs."""
    with opened() as store:
        made = verifying.find(store, checkpoint, round_)
        answer = verifying.verify(store, made, Home.here(), tracked_root(made))
    head = f"{answer.recipe} {answer.round}, checkpoint {answer.checkpoint}, {answer.samples:,} samples\n"
    head += f"root {answer.root or 'cannot be computed'}, recorded {answer.recorded_root or 'none'}"
    show(answer, json_, lambda _: _compared(head, answer))
    raise typer.Exit(0 if answer.ok else 1)


@app.command()
def whatif(
    recipe: RecipeArgument,
    round_: RoundArgument,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="acceptance.x=value", help="A field of the rule. May be given several times."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show what another rule would have decided in a round. Writes nothing."""
    with opened() as store:
        answer = asking.whatif(store, recipe_of(store, recipe, round_), round_, overrides_of(set_))
    show(answer, json_, _side_by_side)


@app.command()
def diff(recipe: RecipeArgument, before: RoundArgument, after: RoundArgument, json_: JsonOption = False) -> None:
    """Show what changed between two rounds: prompts solved and lost, success rates, scores, lengths."""
    with opened() as store:
        answer = differing.diff(store, recipe_of(store, recipe, after), before, after)
    show(answer, json_, _differences)


def tracked_root(made: dict[str, Any]) -> dict[str, str]:
    """A checkpoint's Merkle root in MLflow, as {"MLflow": root}; empty if it has none or cannot be asked."""
    if made["trained_on"] != "accepted" or made["mlflow_run_id"] is None:
        return {}
    try:
        here.tracking().check()
        tags = here.tracking().client().get_run(made["mlflow_run_id"]).data.tags
    except Exception:  # each database's driver raises its own
        return {}
    if tags.get("rsft.checkpoint") != made["checkpoint"]:  # the run has made another since
        return {}
    return {"MLflow": tags["rsft.merkle_root"]} if "rsft.merkle_root" in tags else {}


def _compared(head: str, answer: Any) -> RenderableType:
    """The checks of a replay or verification, and its findings."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("compared", justify="right", no_wrap=True)
    table.add_column("different", justify="right", no_wrap=True)
    for check in answer.checks:
        different = "not compared" if check.differing is None else f"{check.differing:,}"
        style = "red" if check.differing else "yellow" if check.differing is None else None
        note = ("\n  " + check.note, "dim") if check.note else ""  # on a line of its own, where a hash fits
        table.add_row(Text.assemble(check.name, note), f"{check.compared:,}", different, style=style)
    lines: list[RenderableType] = [Text(head), table]
    for finding in answer.findings:
        lines.append(Text(f"{finding.kind}: {finding.what} ({finding.count:,})", style="red"))
        more = " …" if finding.count > len(finding.ids) else ""
        if finding.ids:
            lines.append(Text(f"  {' '.join(finding.ids)}{more}"))
    number = len(answer.findings)
    left = sum(check.differing is None for check in answer.checks)
    same = f"nothing that was compared is different; not compared: {left}" if left else "nothing is different"
    verdict = same if answer.ok else "1 finding" if number == 1 else f"{number} findings"
    return Group(*lines, Text(f"{verdict}, in {answer.seconds:.1f} s", style="green" if answer.ok else "red"))


def _side_by_side(answer: asking.WhatIf) -> RenderableType:
    was, would, both = answer.was, answer.would, answer.agreement
    rows = [
        ("rule", _rule(was.parameters), _rule(would.parameters)),
        ("accepted", f"{was.accepted:,} ({was.rate:.1%})", f"{would.accepted:,} ({would.rate:.1%})"),
        ("prompts with accepted", f"{was.prompts:,}", f"{would.prompts:,}"),
        ("accepted per prompt", _spread(was.per_prompt), _spread(would.per_prompt)),
        ("largest share of a prompt", f"{was.largest_share:.2%}", f"{would.largest_share:.2%}"),
        ("mean score of the accepted", _number(was.score), _number(would.score)),
        ("mean tokens of the accepted", _number(was.tokens), _number(would.tokens)),
    ]
    for reason in dict.fromkeys([*was.reasons, *would.reasons]):
        if reason != "accepted":
            rows.append((f"rejected: {reason}", f"{was.reasons.get(reason, 0):,}", f"{would.reasons.get(reason, 0):,}"))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in (f"{answer.recipe} {answer.round}, {answer.candidates:,} candidates", "was", "would be"):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    agreement = (
        f"accepted by both rules {both.both:,}, only by the recorded one {both.only_was:,}, only by the other "
        f"{both.only_would:,}, by neither {both.neither:,}; in {answer.seconds:.1f} s"
    )
    return Group(table, Text(agreement), *(Text(note, style="yellow") for note in answer.notes))


def _rule(parameters: dict[str, Any]) -> str:
    said = words.rule(parameters)
    return ", ".join((said.pop("rule"), named(said)))


def named(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {_number(value) if isinstance(value, float) else value}" for name, value in values.items()
    )


def _spread(per_prompt: dict[int, int]) -> str:
    """How many candidates of a prompt are accepted: least, most, median."""
    counts = sorted(per_prompt)
    half, seen = sum(per_prompt.values()) / 2, 0
    for count in counts:
        seen += per_prompt[count]
        if seen >= half:
            return f"{counts[0]} to {counts[-1]}, median {count}"
    return "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _differences(answer: differing.Diff) -> RenderableType:
    lines: list[RenderableType] = []
    for name, found in (("drawn for training", answer.drawn), ("held out", answer.held_out)):
        if found is None:
            lines.append(Text(f"{name}: one of the rounds was not evaluated"))
            continue
        head = f"{name}: {found.shared:,} prompts in both; {found.solved:,} newly solved, {found.lost:,} lost"
        if not found.shifts:
            lines.append(Text(head))
            continue
        table = Table(title=head, title_justify="left", box=box.SIMPLE, pad_edge=False)
        for column in ("mean over prompts", answer.before, answer.after, "difference", "interval"):
            table.add_column(column)
        for shift in found.shifts:
            table.add_row(
                shift.what,
                _number(shift.before),
                _number(shift.after),
                f"{shift.difference:+.4g}",
                "open" if shift.low is shift.high is None else f"[{_number(shift.low)}, {_number(shift.high)}]",
            )
        lines.append(table)
        if any(shift.low is shift.high is None for shift in found.shifts):
            lines.append(Text("  open: every prompt changed by the same amount, so there is no interval", style="dim"))
        for what, changes in (("solved", found.solved_first), ("lost", found.lost_first)):
            for change in changes[:5]:
                lines.append(
                    Text(f"  {what}: {(change.text or '(erased)')[:80]!r} {change.before:.0%} → {change.after:.0%}")
                )
    return Group(*lines, *(Text(note, style="yellow") for note in answer.notes))
