"""`rsft audit trace`, `impact`, `revoke` and `export`: where one thing came from, where it led, taking it out of use.

Belongs here: arguments, and how an answer is shown. Not: the answers (rsft_pipeline/audit), nor what Dagster and
MLflow add to them (assets/outside.py).
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text
from rich.tree import Tree

from cli import here
from cli.audit import CheckpointArgument, RecipeOption, RoundOfArgument, named, opened, show
from cli.console import JsonOption
from rsft_pipeline.audit import export as exporting
from rsft_pipeline.audit import ids, words
from rsft_pipeline.audit import impact as following
from rsft_pipeline.audit import revoke as revoking
from rsft_pipeline.audit import trace as tracing
from rsft_pipeline.audit import verify as verifying
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.revocations import printable
from rsft_pipeline.store import StoreError

TextOption = Annotated[
    str | None,
    typer.Option("--text", metavar="WORDS", help="A text that prompts or completions contain, literally."),
]
ThingArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="THING",
        help="The id of a candidate, prompt, checkpoint or scorer version, or its beginning; or the name of a source "
        "of prompts or of a scorer.",
    ),
]


# --- trace -------------------------------------------------------------------------------------


def trace(
    candidate: Annotated[str | None, typer.Argument(metavar="CANDIDATE", help="Its id or the beginning of it.")] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="WORDS", help="A text that its completion contains, literally."),
    ] = None,
    accepted: Annotated[
        tuple[str, str, int] | None,
        typer.Option(metavar="RECIPE ROUND N", help="The Nth of a round's accepted set, in the order of ids, from 1."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what MLflow and Dagster add, which take seconds to load.")
    ] = False,
    recipe: RecipeOption = None,
    json_: JsonOption = False,
) -> None:
    """Follow a candidate from its prompt's source row to the checkpoints that learned from it."""
    if sum(given is not None for given in (candidate, text, accepted)) != 1:
        raise AuditError("say which candidate: its id, --text, or --accepted")
    if not quick:
        try:
            here.tracking().check()
        except OSError as error:
            raise AuditError(f"{error}; --quick asks the store alone") from None
    with opened(recipe) as store:
        if text is not None:
            matches, there = ids.containing(store, text, recipe)
            if there != 1:
                answer = {"candidates": there, "matches": [asdict(one) for one in matches]}
                show(answer, json_, lambda _: _matches(text, matches, there))
                raise typer.Exit(0 if matches else 1)
            candidate = matches[0].candidate_id
        if accepted is not None:
            candidate, recipe = ids.accepted(store, *accepted), accepted[0]
        found = tracing.trace(store, candidate, recipe)
    answer = {**asdict(found), "complete": found.complete, **({} if quick else _outside(found))}
    show(answer, json_, lambda _: _chain(found, answer))


def _outside(found: tracing.Trace) -> dict[str, Any]:
    """What MLflow and Dagster know of the checkpoints and runs in a trace."""
    from assets import outside

    digests = [one.digest for one in found.weights] + [one.checkpoint for one in found.learned]
    return {
        "mlflow": outside.registered(here.tracking(), found.recipe, digests),
        "dagster": outside.runs(here.instance(), _wrote(found)),
    }


def _wrote(found: tracing.Trace) -> Iterator[tuple[str | None, str]]:
    """The runs that wrote something of a trace, each with the asset that wrote it."""
    held_out = found.prompt and found.prompt.split == "eval"
    links = [
        ("prompts", found.prompt),
        ("evaluation" if held_out else "candidates", found.draw),
        *(("evaluation" if held_out else "scores", score) for score in found.scores),
        *(("accepted", decision) for decision in (found.decision_then, found.decision)),
        *(("checkpoint", weights) for weights in found.weights),
        *(("controls" if one.role.startswith("control") else "checkpoint", one) for one in found.learned),
    ]
    return ((link.dagster_run_id, asset) for asset, link in links if link)


def _matches(text: str, matches: list[ids.Match], there: int) -> Tree:
    first = f"; the first {len(matches)}" if len(matches) < there else ""
    tree = Tree(Text(f"{there:,} candidates contain {text!r}{first}" if there else f"no candidate contains {text!r}"))
    for one in matches:
        undecided = "held out" if one.split == "eval" else "not decided on"
        decided = {True: "accepted", False: "rejected", None: undecided}[one.accepted]
        tree.add(Text(f"{one.candidate_id}  {one.recipe} {one.round}, {decided}: {_said(one.text)}"))
    return tree


def _chain(found: tracing.Trace, answer: dict[str, Any]) -> Tree:
    tree = Tree(Text(f"candidate {found.candidate_id} of {found.recipe} {found.round}", style="bold"))
    for why in found.revoked:
        tree.add(Text(why, style="red"))
    if found.prompt:
        asked = found.prompt
        source = printable(asked.source)
        node = tree.add(Text(f"prompt {asked.prompt_id} ({asked.split}), from line {asked.line} of {source}"))
        for one in asked.earlier:
            node.add(Text(f"read earlier from line {one['line']} of {printable(one['source'])}"))
        if asked.snapshot is not None:
            node.add(Text(f"as it was when judged, in snapshot {asked.snapshot}; it has changed since", style="yellow"))
        node.add(Text(_said(asked.text)))
        if asked.reference is not None:
            node.add(Text(f"reference {_said(asked.reference)}"))
    _weights(tree, found, answer)
    _drawn(tree, found.draw)
    if not found.of_round:
        left = f"not among the draws of {found.recipe} {found.round} as it ran: left by an earlier attempt at the round"
        tree.add(Text(left, style="yellow"))
    judged = tree.add("judged" if found.scores else "not judged")
    for score in found.scores:
        value = "cannot judge" if score.value is None else f"{score.value:.6g}"
        gate = "" if score.passed is None else ", every gate passed" if score.passed else ", a gate not passed"
        rested = "" if score.decided_by else " (not used for the decision)"
        judged.add(Text(f"{score.scorer} {value}{gate}, version {score.version}{rested}"))
    for name, one in (("decided", found.decision), ("decided when it was trained on", found.decision_then)):
        if one:
            node = tree.add(Text(f"{name}: {one.reason}: {one.words}", style="green" if one.accepted else "yellow"))
            numbers = named(words.rule(one.parameters))
            log_a = "" if one.log_a is None else f", log A {one.log_a:.6g}"
            node.add(Text(f"{numbers}; u {one.u:.6g}{log_a}"))
    if found.evaluated:
        tree.add(f"held out: counted in the verdict of {', '.join(' '.join(one) for one in found.evaluated)}")
    _learned(tree, found, answer)
    for run, known in answer.get("dagster", {}).items():
        events = ", ".join(f"{event['asset']} {event['event']}" for event in known["events"])
        tree.add(Text(f"Dagster run {run} ({known['job']}, {known['state']}): {events or 'nothing materialised'}"))
    for gap in found.gaps:
        tree.add(Text(f"missing: {gap}", style="red"))
    return tree


def _weights(tree: Tree, found: tracing.Trace, answer: dict[str, Any]) -> None:
    node = tree
    for i, one in enumerate(found.weights):
        verb = "trained from" if i else {"reference": "rated by"}.get(found.draw.origin, "drawn from")
        samples = "" if one.samples is None else f", trained on {one.samples:,} samples"
        node = node.add(Text(f"{verb} {one.digest} ({one.source}{samples}{_version(answer, one.digest)})"))


def _drawn(tree: Tree, draw: tracing.Draw) -> None:
    node = tree.add(Text(f"draw {draw.draw} of its prompt, {draw.tokens} tokens, ended by {draw.finish_reason}"))
    node.add(Text(_said(draw.text)))
    if draw.token_ids is not None:
        node.add(Text(f"token ids {draw.token_ids}"))
    given = (draw.sampling or {"settings": f"{draw.settings}, which are not recorded"}).items()
    node.add(
        Text(f"{', '.join(f'{key} {value}' for key, value in given if value not in (None, []))}; its seed {draw.seed}")
    )
    node.add(Text(f"log q {_number(draw.log_q)}, log p {_number(draw.log_p)}"))


def _learned(tree: Tree, found: tracing.Trace, answer: dict[str, Any]) -> None:
    if not found.learned:
        tree.add("no checkpoint learned from it")
        return
    node = tree.add("learned by")
    for one in found.learned:
        weight = "" if one.weight is None else f", weight {one.weight:g}"
        used = ", revoked" if one.revoked else ", champion" if one.champion else ""
        line = f"{one.checkpoint} ({one.recipe} {one.round}, {one.role}{used}): {one.how}{weight}"
        node.add(Text(f"{line}{_version(answer, one.checkpoint)}; MLflow run {one.mlflow_run_id}"))


def _version(answer: dict[str, Any], digest: str) -> str:
    known = answer.get("mlflow", {}).get(digest)
    if not known:
        return ""
    return f", registered as version {known['version']}{''.join(f' @{alias}' for alias in known['aliases'])}"


# --- impact ------------------------------------------------------------------------------------


def impact(
    thing: ThingArgument = None, text: TextOption = None, recipe: RecipeOption = None, json_: JsonOption = False
) -> None:
    """Show what a thing influenced, and which rounds to run again to be rid of it."""
    with opened(recipe) as store:
        found = following.impact(store, _thing(store, thing, text, recipe))
    show(found, json_, _reach)


def _thing(store, typed: str | None, text: str | None, recipe: str | None) -> ids.Thing:
    if (typed is None) == (text is None):
        raise AuditError("say what: an id or a name, or else --text")
    return ids.thing(store, typed, recipe) if text is None else ids.text(store, text, recipe)


def _reach(found: following.Impact) -> Tree:
    tree = Tree(Text(f"{found.thing.words} of {', '.join(found.thing.recipes)}", style="bold"))
    of = f"{_count(found.prompts, 'prompt')}, " if found.prompts else ""
    drawn = f"{_count(found.candidates, 'candidate')}, {found.accepted:,} accepted"
    tree.add(f"{of}{drawn}; {found.held_out:,} more held out")
    if found.evaluated:
        tree.add(f"counted in the verdict of {', '.join(' '.join(one) for one in found.evaluated)}")
    node = tree.add(f"learned by {_count(len(found.checkpoints), 'checkpoint')}")
    for one in found.checkpoints:
        revoked = ", revoked" if one.revoked else ""
        node.add(Text(f"{one.checkpoint} ({one.recipe} {one.round}, {one.role}{revoked}): {one.how}"))
    if found.later_candidates:
        tree.add(f"{found.later_candidates:,} more candidates drawn from these, {found.later_accepted:,} accepted")
    for recipe, champion in found.champions:
        tree.add(Text(f"{champion} is the champion of {recipe}", style="yellow"))
    _again(tree, found.again)
    return tree


def _again(tree: Tree, again: list[following.Again]) -> None:
    if not again:
        tree.add(Text("no round has to be run again", style="green"))
        return
    node = tree.add("to be rid of it, run these rounds again, in this order")
    for one in again:
        node.add(Text(f"{one.recipe} {one.round}: {one.why}"))


# --- revoke ------------------------------------------------------------------------------------


def revoke(
    thing: ThingArgument = None,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who is responsible for the revocation.")] = ...,
    why: Annotated[str, typer.Option(metavar="WHY", help="The reason.")] = ...,
    text: TextOption = None,
    erase: Annotated[bool, typer.Option("--erase", help="Also remove its text and what was drawn for it.")] = False,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget", help="With --erase: also delete older snapshots of the store, which still have the text."
        ),
    ] = False,
    recipe: RecipeOption = None,
    json_: JsonOption = False,
) -> None:
    """Take a thing out of use: nothing trains on it any more, and rounds that learned from it have to run again."""
    if forget and not erase:
        raise AuditError("--forget goes with --erase: nothing was erased that older snapshots could still have")
    here.tracking().check()  # revocations are marked in MLflow too
    with opened(recipe) as store:
        instance = here.instance()
        if forget:
            _check_idle(instance)
        found = _thing(store, thing, text, recipe)
        if found.kind == "source" and len(found.recipes) > 1:
            raise AuditError(
                f"{found.words} is in {', '.join(found.recipes)}, and each may have a file of its own by that name: "
                "name one with --recipe, then the next"
            )
        done = revoking.revoke(store, found, who=by, why=why, erase=erase)
        here.tell(instance, store, done)
        left, failed = [], None
        try:
            left = store.forget() if forget else []
        except StoreError as error:  # first say what was done
            failed = error
    forgotten = forget and not failed
    answer = {**asdict(done), "keeping": [] if forgotten else done.keeping, "left": left}
    show(answer, json_, lambda _: _revoked(done, forgotten, left))
    if failed:
        raise failed


def _check_idle(instance) -> None:
    from automation.runs import under_way

    if working := under_way(instance):
        raise AuditError(f"a run of {working[0].job_name} is under way: use --forget when it is over")


def _revoked(done: revoking.Revoked, forget: bool, left: list[str]) -> Tree:
    tree = _reach(done.impact)
    tree.label = Text(
        f"revoked: {done.impact.thing.words}, by {printable(done.who)}: {printable(done.why)}", style="bold"
    )
    for recipe in dict.fromkeys(recipe for recipe, _ in done.marked):
        count = sum(name == recipe for name, _ in done.marked)
        tree.add(f"marked: `rsft run {recipe} --rounds {count}` runs them again")
    if done.marked and (first := FIRST.get(done.impact.thing.kind)):
        tree.add(Text(first, style="yellow"))
    found = done.impact
    if found.thing.kind == "text" and not (found.prompts or found.candidates or found.held_out):
        tree.add(Text("nothing here contains it yet: the revocation applies to what comes later", style="yellow"))
    if done.erased:
        node = tree.add(
            ", ".join(
                f"{count:,} {'text' if count == 1 else 'texts'} erased from `{table}`"
                for table, count in done.erased.items()
            )
        )
        if forget:
            node.add("older snapshots are gone, with their files")
            for file in left:
                node.add(Text(f"still there: {file}", style="red"))
        elif done.keeping:
            node.add(Text(f"{len(done.keeping)} older snapshots still have them: --forget", style="yellow"))
        node.add("not reached: " + "; ".join(NOT_REACHED))
    return tree


FIRST = {  # what to do before the rounds are run again
    "checkpoint": "an unchanged recipe may give the same weights again, which are refused: change it, or revoke what "
    "they learned from",
    "scorer": "change the scorer first: no round may use this version",
    "source": "if a recipe has no other source, give it one first",
}
NOT_REACHED = (
    "the source itself, which the next round reads again",
    "the weights that learned from it, in checkpoints/ and wherever they were copied",
    "examples in the metadata of Dagster's events, and MLflow's artifacts",
    "a base model that was made here or warmed up, in models/, and its corpus",
    "exports and backups",
)


# --- export ------------------------------------------------------------------------------------


def export(
    checkpoint: CheckpointArgument,
    round_: RoundOfArgument = None,
    *,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.")],
    format_: Annotated[Literal["parquet", "jsonl"], typer.Option("--format", help="Format of the rows.")] = "parquet",
    recipe: RecipeOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a checkpoint's training set to a folder, with its provenance in OpenLineage and Croissant."""
    with opened(recipe) as store:
        if round_ is None:
            ids.check_not_recipe(store, checkpoint)
        else:
            recipe, checkpoint = checkpoint, verifying.find(store, checkpoint, round_)["checkpoint"]
        done = exporting.export(store, checkpoint, to, format_, recipe, round_)
    show(done, json_, lambda _: _written(done))


def _written(done: exporting.Exported) -> Tree:
    tree = Tree(Text(f"{done.samples:,} samples of {done.checkpoint} ({done.recipe} {done.round})", style="bold"))
    for file in done.files:
        tree.add(Text(file))
    for note in done.notes:
        tree.add(Text(note, style="yellow"))
    return tree


def _said(text: str | None) -> str:
    """A text in quotes, with unprintable characters escaped: a completion could otherwise control the terminal."""
    return "(erased)" if text is None else repr(text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"
