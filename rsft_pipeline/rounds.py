"""Rounds: their keys, their record, which weights a round starts from, and when the loop ends.

Belongs here: questions about rounds that the store can answer. Not: what happens inside a round.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb
from pydantic import ValidationError

from rsft_pipeline import models, revocations
from rsft_pipeline.evaluation import FinishedRound, Metric, stop_reason
from rsft_pipeline.home import Home
from rsft_pipeline.models import checkpoints
from rsft_pipeline.recipe.evaluation import MOST_ROUNDS, Stop
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RECORDED, refusals
from rsft_pipeline.store import Store


class RoundError(RuntimeError):
    """A round that cannot continue; the message says why."""


def key(number: int) -> str:
    """`r000`, `r001`, …: zero-padded, so that keys sort in the order of the rounds."""
    return f"r{number:03d}"


def number(round_key: str) -> int:
    """The number of a round's key. Raises RoundError for anything else."""
    if not re.fullmatch("r[0-9]{3}", round_key):
        raise RoundError(f"{round_key!r} is not a round; expected r000, r001, … up to r{MOST_ROUNDS - 1}")
    return int(round_key[1:])


# --- the record ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """A round that was begun: the recipe as it was then, and the weights it samples from.

    Every later step uses this record and not the recipe's file, so that an edit in the middle of a
    round cannot mix two recipes. Beginning the round again picks up the edit.
    """

    recipe: Recipe
    key: str
    policy: str
    policy_source: str
    drawn_from: str  # the weights that candidates come from: the policy's, or a teacher's
    mlflow_run_id: str
    answers: str | None = None  # digest of the reference answers it began with, if they are its candidates


def check_nothing_stands_on(store: Store, recipe: str, round_key: str) -> dict | None:
    """The round's row, or None; RoundError if later rounds build on it: no step of it can then be run again.

    Only what was revoked with it builds on a revoked round. Once such a round has begun again, the later rounds that
    started before that do not build on it either.
    """
    sql = "SELECT * FROM rounds WHERE recipe = ? AND round >= ? ORDER BY round"
    rows = {row["round"]: row for row in store.query(sql, [recipe, round_key])}
    own = rows.pop(round_key, None)
    if own and own["state"] == "revoked":
        return own
    since = own and own["started_at"]
    for later, row in rows.items():
        begun = row["started_at"]
        if row["state"] != "revoked" and (since is None or (begun is not None and begun > since)):
            raise RoundError(
                f"{recipe} {round_key} cannot be run again: {later} stands on it. "
                "To start over with another recipe, copy it under another name"
            )
    return own


def begin(store: Store, round_: Round, dagster_run_id: str) -> None:
    """Record that a round has begun, replacing an earlier attempt with its decisions and evaluations."""
    record = {
        "recipe": round_.recipe.name,
        "round": round_.key,
        "state": "started",
        "policy": round_.policy,
        "policy_source": round_.policy_source,
        "drawn_from": round_.drawn_from,
        "answers": round_.answers,
        "settings": round_.recipe.model_dump_json(),
        "recipe_digest": round_.recipe.digest,
        "mlflow_run_id": round_.mlflow_run_id,
        "dagster_run_id": dagster_run_id,
    }

    def work(connection):
        for table in ("rounds", "decisions", "evaluations"):
            connection.execute(f"DELETE FROM {table} WHERE recipe = ? AND round = ?", [round_.recipe.name, round_.key])
        columns, values = ", ".join(record), ", ".join("?" for _ in record)
        connection.execute(
            f"INSERT INTO rounds ({columns}, started_at) VALUES ({values}, now())", list(record.values())
        )

    store.commit(work)


def finish(store: Store, round_: Round, **outcome) -> None:
    """Record a round's outcome: columns of the table `rounds`."""
    columns = ", ".join(f"{name} = ?" for name in outcome)
    store.commit(
        lambda connection: connection.execute(
            f"UPDATE rounds SET state = 'finished', finished_at = now(), {columns} WHERE recipe = ? AND round = ?",
            [*outcome.values(), round_.recipe.name, round_.key],
        )
    )


def mark_revoked(connection: duckdb.DuckDBPyConnection, recipe: str, round_key: str) -> None:
    """Let a finished round count as not done, inside the caller's transaction."""
    connection.execute(
        "UPDATE rounds SET state = 'revoked' WHERE recipe = ? AND round = ? AND state = 'finished'",
        [recipe, round_key],
    )


def record(store: Store, recipe: Recipe, round_key: str) -> Round:
    """The record of a round that was begun. Raises RoundError if it was not, or its settings are refused by now."""
    return _record(recipe, round_key, row_of(store, recipe.name, round_key))


def _record(recipe: Recipe, round_key: str, row: dict | None) -> Round:
    if row is None:
        raise RoundError(f"{recipe.name} {round_key} was not begun: materialise its policy first")
    as_it_was = _as_recorded(row, recipe.as_recorded)
    return Round(
        as_it_was,
        round_key,
        row["policy"],
        row["policy_source"],
        row["drawn_from"] or row["policy"],  # rounds older than teachers have none
        row["mlflow_run_id"],
        row["answers"],
    )


def recorded(store: Store, file: Path, round_key: str) -> Recipe:
    """A recipe as a round recorded it, whatever its file says now. Raises RoundError as `record` does."""
    row = row_of(store, file.stem, round_key)
    if row is None:
        raise RoundError(f"{file.stem} {round_key} was not begun")
    return _as_recorded(row, lambda fields: Recipe.of_file(file, fields, RECORDED))


def _as_recorded(row: dict, make: Callable[[dict], Recipe]) -> Recipe:
    try:
        return make(json.loads(row["settings"]))
    except ValidationError as error:
        refused = f"{row['recipe']} {row['round']} ran with settings that are refused by now: {refusals(error)}"
        raise RoundError(refused) from None
    except (TypeError, ValueError) as error:
        raise RoundError(f"{row['recipe']} {row['round']}: its settings in `rounds` cannot be read: {error}") from None


def resume(store: Store, recipe: Recipe, round_key: str) -> Round:
    """The record of a round whose next step is about to run. Also raises RoundError if later rounds build on it."""
    return _record(recipe, round_key, check_nothing_stands_on(store, recipe.name, round_key))


def row_of(store: Store, recipe: str, round_key: str) -> dict | None:
    """A round's row, or None."""
    rows = store.query("SELECT * FROM rounds WHERE recipe = ? AND round = ?", [recipe, round_key])
    return rows[0] if rows else None


def last_begun(store: Store, recipe: str) -> str:
    """The last round that was begun. Raises RoundError if none was."""
    if last := store.value("SELECT max(round) FROM rounds WHERE recipe = ?", [recipe]):
        return last
    raise RoundError(f"no round of {recipe} was begun yet")


def history(store: Store, recipe: str) -> list[dict]:
    """The finished rounds of a recipe, in order."""
    return store.query("SELECT * FROM rounds WHERE recipe = ? AND state = 'finished' ORDER BY round", [recipe])


def champion(store: Store, recipe: str) -> str:
    """The champion in use, or an empty string if no round is finished."""
    finished = history(store, recipe)
    return finished[-1]["champion"] if finished else ""


def following(store: Store, recipe: str) -> str:
    """The round to run next: the first that is not finished."""
    finished = {row["round"] for row in history(store, recipe)}
    return next(key(n) for n in range(len(finished) + 1) if key(n) not in finished)


def in_use(store: Store, recipe: str, round_key: str, left: str) -> str:
    """The champion in use after a round that left `left`: if later rounds are finished, the last one's counts."""
    later = [row["champion"] for row in history(store, recipe) if row["round"] > round_key]
    return later[-1] if later else left


def why_stop(store: Store, recipe: Recipe) -> str | None:
    """Why no further round is due, in words; None while one is due, or a begun or revoked one is not yet finished."""
    if _any_unfinished(store, recipe.name):
        return None
    return _stop_reason(recipe.stop, recipe.promotion.metric, history(store, recipe.name))


def why_stopped(store: Store, recipe: str) -> str | None:
    """The same for a recipe's name, by the stop rules of its last finished round; None also if there is none."""
    finished = history(store, recipe)
    if not finished or _any_unfinished(store, recipe):
        return None
    settings = json.loads(finished[-1]["settings"])
    return _stop_reason(Stop.model_validate(settings["stop"]), settings["promotion"]["metric"], finished)


def _any_unfinished(store: Store, recipe: str) -> bool:
    sql = "SELECT count(*) AS n FROM rounds WHERE recipe = ? AND state <> 'finished'"
    return store.value(sql, [recipe]) > 0


def _stop_reason(stop: Stop, metric: Metric, finished: list[dict]) -> str | None:
    rounds = [
        FinishedRound(row["promoted"], _value(json.loads(row["champion_eval"]), metric), row["tokens"])
        for row in finished
    ]
    return stop_reason(stop, rounds, metric)


def _value(summary: dict, metric: str) -> float | None:
    return summary[metric] and summary[metric]["value"]


# --- the weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Weights and where they came from."""

    digest: str
    path: Path
    source: str  # `base`, `teacher`, or the round that produced them


def starting_weights(store: Store, recipe: Recipe, home: Home, round_key: str, choice: str) -> Weights:
    """The weights that a round samples or trains from.

    Args:
        choice: `champion`, `previous` (the last round's checkpoint) or `base`.

    Raises:
        RoundError: an earlier round is not finished, or the weights are gone or revoked.
    """
    finished = history(store, recipe.name)
    earlier = [row for row in finished if row["round"] < round_key]
    if len(earlier) != number(round_key):
        there = {row["round"] for row in earlier}
        missing = next(key(n) for n in range(number(round_key)) if key(n) not in there)
        raise RoundError(f"{recipe.name} {round_key} needs {missing}, which is not finished: run that round first")
    if choice == "base" or not earlier:
        others = (row for row in finished if row["round"] != round_key and row["policy_source"] == "base")
        weights = _base(recipe, home, next((row["policy"] for row in others), None))
    else:
        digest = earlier[-1]["champion" if choice == "champion" else "checkpoint"]
        weights = _trained(store, recipe, home, digest) or _base(recipe, home, digest)
    if why := revocations.of_weights(store, weights.digest):
        raise RoundError(f"{recipe.name} {round_key} would start from {weights.source}: {why}")
    return weights


def drawing_weights(store: Store, round_: Round, home: Home) -> Weights:
    """The weights that a round's candidates come from. Raises RoundError if they are gone or have changed."""
    policy = locate(store, round_.recipe, home, round_.policy)
    if round_.recipe.sampling.teacher is None:
        return policy
    teacher = models.teacher(round_.recipe, policy.path)
    if teacher.digest != round_.drawn_from:
        raise RoundError(
            f"{round_.recipe.name} {round_.key} began with the teacher {round_.drawn_from}, but `sampling.teacher` "
            f"now gives {teacher.digest}: put it back, or begin the round again"
        )
    return Weights(teacher.digest, teacher.path, "teacher")


def locate(store: Store, recipe: Recipe, home: Home, digest: str) -> Weights:
    """Where the weights that a round used are.

    Raises:
        RoundError, or for a base model ModelError: they are gone or have changed.
    """
    if weights := _trained(store, recipe, home, digest):
        return weights
    if base := models.made(models.bases(home.path), digest):  # no need to resolve `model:`
        return Weights(digest, base.path, "base")
    return _base(recipe, home, digest)


def _trained(store: Store, recipe: Recipe, home: Home, digest: str) -> Weights | None:
    """Weights that a round of the recipe made; None if no round made them."""
    made = store.query(
        "SELECT round FROM checkpoints WHERE recipe = ? AND checkpoint = ? ORDER BY round", [recipe.name, digest]
    )
    if not made:
        return None
    weights = Weights(digest, home.checkpoints / digest, made[0]["round"])
    if not weights.path.is_dir():
        raise RoundError(f"the weights of {recipe.name} {weights.source} are not at {weights.path} any more")
    if changed := checkpoints.verify(checkpoints.Checkpoint(digest, weights.path)):
        raise RoundError(f"{weights.path} is not what {weights.source} saved: {', '.join(changed)} changed since")
    return weights


def _base(recipe: Recipe, home: Home, digest: str | None) -> Weights:
    """The base model, which must be the one that the recipe's rounds started from, if any did."""
    base = models.base(recipe, home.path)
    if digest not in (None, base.digest):
        raise RoundError(
            f"{recipe.name}: these rounds started from the base model {digest}, but `model:` now gives "
            f"{base.digest}: put it back, or copy the recipe under another name. (A warm-up goes by its corpus "
            "too, and by what the section `prompts` holds out of it.)"
        )
    return Weights(base.digest, base.path, "base")
